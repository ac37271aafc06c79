"""What a run will need before it is submitted: memory, disk, time. Start reading at plan.py."""
