"""Can this machine, or this allocation, train and give right numbers? Start reading at examine.py."""
