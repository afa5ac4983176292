"""Fine-tuning jobs as OpenAI's API describes them: from a file of examples to an adapter of a served model."""

from tandem.jobs.fine_tuning.folder import FineTuningFolder
from tandem.jobs.fine_tuning.spec import FineTuningSpec, Hyperparameters, Method

__all__ = ["FineTuningFolder", "FineTuningSpec", "Hyperparameters", "Method"]
