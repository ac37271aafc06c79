"""Let a teacher model write the steps of problems: python tools/annotate.py --data svamp --base_url URL --model NAME ..."""

from trainer.commands.annotate import main

if __name__ == "__main__":
    main()
