import time
from trainer.evaluation.evaluate import evaluate
from trainer.settings import EvaluateSettings
import json
def test_x(export, shards):
    t=time.time()
    r=evaluate(EvaluateSettings(model_name_or_path=str(export), shards=str(shards.path), batch_size=4))
    print(time.time()-t, json.dumps(r,indent=1))
    for l in (export.parent/"evaluation"/"stories-test-socratic"/"predictions.jsonl").read_text().splitlines()[:3]: print(l)
    r=evaluate(EvaluateSettings(model_name_or_path=str(export), shards=str(shards.path), batch_size=4, calculator=False))
    print(r['accuracy'])
