"""Write a report of finished runs: python tools/plot_scaling.py runs/quickstart"""

from trainer.commands.plot_scaling import main

if __name__ == "__main__":
    main()
