"""Submits a preference job (DPO): a model or a LoRA adapter of one learns which of two answers is the better.

    python train_apps/dpo.py --config train_apps/recipes/quickstart_dpo.yaml --set steps=200

The job goes to the Ray cluster at RAY_ADDRESS, or to one that is started here for as long as it takes. The script prints
the job's id, shows its progress, and ends with its exit status; with --detach it returns at once.
"""

from tandem.cli.train import submit_script

if __name__ == "__main__":
    submit_script("dpo")
