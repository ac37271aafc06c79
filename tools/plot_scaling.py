"""Write a report of finished runs: python tools/plot_scaling.py runs/quickstart"""

from trainer.commands.main import run_command

if __name__ == "__main__":
    run_command("plot_scaling")
