"""A finished model as ONNX, for programs without torch: uint8 images in, calibrated probabilities out."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from csm.calibrated import CalibratedClassifier
from csm.errors import InputError
from csm.storage import replacing

# Of csm.posthoc.POSTHOC, those that are smooth. isotonic and histogram are not: a rounding at a knot or edge would be seen.
EXPORTABLE = ("none", "temperature", "ensemble-temperature", "vector", "matrix", "dirichlet")
OPSET = 20
TOLERANCE = 1e-5  # of a probability


def export_onnx(model: CalibratedClassifier, path: Path, images: torch.Tensor | None = None) -> float:
    """Write ``model`` to ``path`` as ONNX, for batches of any size, once onnxruntime was seen to give the same.

    Input ``images`` uint8 (batch, H, W, C), output ``probabilities`` float32 (batch, K), opset 20.

    Args:
        model: on the CPU.
        path: of the file.
        images: uint8 (N, H, W, C) on which it is checked, beside random ones.

    Returns:
        Largest difference of a probability between onnxruntime and torch.

    Raises:
        InputError: a package is missing, or the model's calibration or network cannot be exported.
        RuntimeError: the two differ by more than 1e-5; nothing is left on disk.
    """
    posthoc = model.spec.posthoc.name
    if posthoc not in EXPORTABLE:
        raise InputError(
            f"posthoc {posthoc} cannot be exported to ONNX: fit one of {', '.join(EXPORTABLE)}, or export to safetensors or mlflow"
        )
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  torch's exporter needs it
    except ModuleNotFoundError as error:
        raise InputError(f"ONNX needs the package {error.name}, which is not installed: pip install 'csm[onnx]'") from None
    model.eval()
    draw = torch.Generator().manual_seed(0)
    random = torch.randint(0, 256, (5, *model.spec.shape), generator=draw, dtype=torch.uint8)
    with _silent():
        try:
            program = torch.onnx.export(
                model,
                (random[:2],),  # of more than one image, or the number would be taken for a constant
                dynamo=True,
                input_names=["images"],
                output_names=["probabilities"],
                dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
                opset_version=OPSET,
                verbose=False,
            )
        except Exception as error:  # the exporter raises many types, with pages of text
            reason = str(error.__cause__ or error).strip().partition("\n")[0][:200]
            raise InputError(
                f"network {model.spec.network} cannot be exported to ONNX ({type(error).__name__}: {reason}): "
                "export to safetensors or mlflow"
            ) from error
        assert program is not None
        with replacing(path) as temporary:
            program.save(temporary)
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 3
            session = onnxruntime.InferenceSession(temporary, options, providers=["CPUExecutionProvider"])
            difference = 0.0
            for batch in (random[:1], random, *([] if images is None else images.split(64))):
                (found,) = session.run(["probabilities"], {"images": batch.numpy()})
                difference = max(difference, float(np.abs(found - model.predict(batch).numpy()).max()))
            if not difference <= TOLERANCE:  # NaN, too
                raise RuntimeError(f"onnxruntime differs from torch by {difference:.1e} in a probability; {path} is not written")
    return difference


@contextmanager
def _silent() -> Iterator[None]:
    """The exporter warns of packages that nothing here needs, and of its own use of torch."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
