"""Studies (models x methods x data x seeds): read the study file, find the stages that are not done, run them."""
