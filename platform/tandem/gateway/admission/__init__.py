"""Admission control of the gateway: bounded queues for each model, and the demand that autoscaling reads."""
