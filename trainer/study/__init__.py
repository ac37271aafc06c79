"""Models x methods x data x seeds: which runs a study file describes, what is done, and doing the rest."""
