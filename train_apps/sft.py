"""Submits a fine-tuning job: a model or a LoRA adapter of one, from question-answer pairs.

    python train_apps/sft.py --config train_apps/recipes/quickstart_sft.yaml --set steps=200

The job goes to the Ray cluster at RAY_ADDRESS, or to one that is started here for as long as it takes. The script prints
the job's id, shows its progress, and ends with its exit status; with --detach it returns at once.
"""

from tandem.cli.train import submit_script

if __name__ == "__main__":
    submit_script("sft")
