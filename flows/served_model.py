"""What MLflow runs of a finished model ("models from code"): copied into the model's folder, beside the package csm."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc import PythonModel, PythonModelContext

from csm.calibrated import load_calibrated
from csm.errors import InputError


class ServedModel(PythonModel):
    """Calibrated probabilities float32 (N, K) of images uint8 (N, H, W, C); weights are safetensors, nothing is unpickled."""

    def load_context(self, context: PythonModelContext) -> None:
        self.model = load_calibrated(Path(context.artifacts["model.json"]).parent)

    def predict(self, context: PythonModelContext, model_input: np.ndarray, params: Mapping[str, Any] | None = None):
        """``params["batch_size"]`` images go through the network together; what cannot be used is HTTP 400."""
        batch_size = (params or {}).get("batch_size", 256)
        try:
            if batch_size < 1:
                raise InputError(f"batch_size: expected a whole number above 0, got {batch_size}")
            return self.model.predict(torch.from_numpy(np.ascontiguousarray(model_input)), batch_size).numpy()
        except (InputError, TypeError) as error:  # torch has no tensors of some dtypes of numpy
            raise MlflowException(str(error), error_code=INVALID_PARAMETER_VALUE) from None


set_model(ServedModel())
