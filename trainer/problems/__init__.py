"""Math and yes/no problems with reasoning steps: data sets, answer extraction and the calculator."""
