"""Training: the step, the loop around it, and the run folders that it leaves."""
