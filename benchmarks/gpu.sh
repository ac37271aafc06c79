#!/usr/bin/env bash
# The benchmarks on one GPU, also where there is no network.
#
#   benchmarks/gpu.sh wheels [--have FILE]    where there is a network: packages and GSM8K's shards into build/gpu
#   benchmarks/gpu.sh run PART ... [--tiny]   on the GPU: parity, decode, train, memory, evaluate, convert, study; or all
#   benchmarks/gpu.sh table [--tiny]          the table of what is measured so far
#
# Copy the checkout with build/gpu to the GPU machine. A call takes at most about ten minutes (SECONDS_EACH), the study as
# long again; measured rows are kept, and after exit status 75 the same command continues. A peer that times out is recorded
# as failed. `parity` must pass first. `--tiny` runs small shapes, also on a CPU.
#
# wheels: PYTHON_VERSION (3.12) and PLATFORM (manylinux_2_28_x86_64) of the GPU machine; --have: its `pip freeze`, whose
#   packages are not fetched if the version is equal or not given. GSM8K, TOKENIZER: local folders instead of the hub's.
# run: PYTHON is a Python with torch for CUDA (python3), which is not changed; ours is installed in build/gpu/site-packages.
set -euo pipefail
cd "$(dirname "$0")/.."
GPU=$PWD/build/gpu
PYTHON=${PYTHON:-python3}
SECONDS_EACH=${SECONDS_EACH:-540}
PARTS=(parity decode train memory evaluate convert)
# Packages of a CUDA image: torch and its dependencies. Never replaced.
IMAGE='^(torch|triton|nvidia-.*|filelock|fsspec|jinja2|markupsafe|mpmath|networkx|numpy|sympy|typing[_-]extensions|setuptools|pip)=='
# Imports of the trainer and TRL for training, evaluation, conversion and reports.
NEEDED=(accelerate annotated-types contourpy cycler datasets deepspeed dill einops fonttools hf-xet hjson huggingface_hub
    kiwisolver markdown-it-py matplotlib mdurl msgpack multiprocess ninja packaging pandas pillow psutil py-cpuinfo pyarrow
    pydantic pydantic_core Pygments pyparsing python-dateutil PyYAML regex rich sacrebleu safetensors tabulate colorama
    portalocker lxml tokenizers tqdm transformers typer typing-inspection xxhash click shellingham httpx httpcore httpx2 httpcore2 truststore annotated-doc tzdata h11 anyio
    idna certifi sniffio requests urllib3 charset-normalizer)

main() {
    local command=${1:-}
    shift || true
    case $command in
        wheels) wheels "$@" ;;
        run) run "$@" ;;
        table) environment && "$PYTHON" -m benchmarks.gpu.table "$@" ;;
        *) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; exit 2 ;;
    esac
}

wheels() {
    local have=/dev/null
    if [ "${1:-}" = --have ]; then have=${2:?--have needs a file}; fi
    mkdir -p "$GPU/wheels"
    local wanted=() name
    for name in "${NEEDED[@]}"; do wanted+=("$(grep -ixE "${name//[-_]/[-_]}==[^ ]+" constraints.txt)"); done
    wanted+=("$(grep -ixE 'trl==[^ ]+' benchmarks/requirements.txt)")
    printf '%s\n' "${wanted[@]}" | grep -viE "$IMAGE" | grep -viExf <(there "$have") >"$GPU/wheels.txt"
    local version=${PYTHON_VERSION:-3.12} target
    target=(--only-binary=:all: --implementation cp --python-version "$version")
    for name in "${PLATFORM:-manylinux_2_28_x86_64}" manylinux_2_27_x86_64 manylinux_2_17_x86_64 manylinux2014_x86_64 \
        manylinux_2_12_x86_64 manylinux2010_x86_64 manylinux_2_5_x86_64 manylinux1_x86_64; do target+=(--platform "$name"); done
    # DeepSpeed is published as source; without compiled ops its wheel fits every Python.
    grep -v '^deepspeed==' "$GPU/wheels.txt" | xargs "$PYTHON" -m pip download --quiet --no-deps "${target[@]}" -d "$GPU/wheels"
    if grep -q '^deepspeed==' "$GPU/wheels.txt"; then
        DS_BUILD_OPS=0 "$PYTHON" -m pip wheel --quiet --no-deps "$(grep '^deepspeed==' "$GPU/wheels.txt")" -w "$GPU/wheels"
    fi
    du -sh "$GPU/wheels"
    local split
    for split in train test; do
        "$PYTHON" tools/prepare_shards.py --data gsm8k --data_path "${GSM8K:-openai/gsm8k}" --split "$split" \
            --tokenizer_name "${TOKENIZER:-openai-community/gpt2}" --output_dir "$GPU/shards/gsm8k-$split"
    done
}

# Lines of a file, name==version or name alone (any version will do), as patterns for grep.
there() {
    sed -e 's/[[:space:]]*$//' -e '/^[[:alnum:]]/!d' -e '/==/!s/$/==.*/' -e 's/\./[.]/g' -e 's/==\[[.]\]\*$/==.*/' \
        -e 's/[-_]/[-_]/g' "$1"
    echo nothing
}

# Put our packages before those of the image, which is not changed. dill recognises the name site-packages, so that
# `datasets` does not pickle its modules.
environment() {
    export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
    export PEERS_PYTHON=${PEERS_PYTHON-$(peers)}
    local site=$GPU/site-packages
    if ! compgen -G "$GPU/wheels/*.whl" >/dev/null || [ "${WITHOUT_WHEELS:-}" ]; then return; fi
    if [ ! -e "$site/.ready" ]; then
        rm -rf "$site"
        "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$GPU"/wheels/*.whl
        touch "$site/.ready"
    fi
    export PYTHONPATH=$site:$PYTHONPATH PATH=$site/bin:$PATH
    PEERS_PYTHON=$PYTHON
}

# Print a Python that has TRL: this one, or that of `make bench`.
peers() {
    if "$PYTHON" -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("trl"))'; then
        command -v "$PYTHON"
    elif [ -x .venv-peers/bin/python ]; then
        echo .venv-peers/bin/python
    fi
}

run() {
    local parts=() study= status=0
    while [ "${1:-}" ] && [[ $1 != --* ]]; do
        case $1 in
            all) parts=("${PARTS[@]}") study=yes ;;
            study) study=yes ;;
            *) parts+=("$1") ;;
        esac
        shift
    done
    if [ -z "${parts[*]}$study" ]; then main; fi
    environment
    if [ "${parts[*]}" ]; then
        "$PYTHON" -m benchmarks.gpu.run "${parts[@]}" --seconds "$SECONDS_EACH" "$@" || status=$?
        "$PYTHON" -m benchmarks.gpu.table $(printf '%s\n' "$@" | grep -x -- --tiny) >/dev/null || true
    fi
    if [ "$study" ] && [ $status = 0 ]; then
        "$PYTHON" -m benchmarks.gpu.study --seconds "$SECONDS_EACH" "$@" || status=$?
    fi
    return $status
}

main "$@"; exit
