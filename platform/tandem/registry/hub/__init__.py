"""Models and datasets of the Hugging Face hub: by name and revision, downloaded once into TANDEM_HOME/cache/hub.

reference.py   names: `org/name`, `org/name@revision`, `hf://datasets/org/name/path`
selection.py   the files of a repository that are needed
client.py      the hub's answers: commits, files, errors
cache.py       the files here: locked, resumed, verified
report.py      progress on the terminal
models.py      a model's record in the registry
datasets.py    the files of a dataset
"""

from tandem.registry.hub.datasets import DatasetFiles, pull_dataset
from tandem.registry.hub.models import pull_model, restore
from tandem.registry.hub.reference import HubDataset, HubModel

__all__ = ["DatasetFiles", "HubDataset", "HubModel", "pull_dataset", "pull_model", "restore"]
