"""import-generator: take over a model that somebody else trained."""

from pathlib import Path

from csm import storage
from csm.datasets import RealDataset
from csm.errors import InputError
from csm.generators import load_generator
from csm.generators.config import GeneratorConfig
from csm.generators.importing import IMPORTERS, ImportOptions, detect
from csm.locations import local
from flows.artifacts import StageRecord
from flows.progress import say
from flows.stages import Context, Made


def import_generator(context: Context, record: StageRecord) -> Made:
    """Convert the model at ``generator.path`` to safetensors and JSON in the workspace, and load it once to see that it works."""
    config, directory = context.config.generator, context.workspace.generator
    info = RealDataset.load_info(context.workspace.root)
    kind = kind_of_model(config)
    options = ImportOptions(info.class_names, config.classes, config.guidance, config.prompt)
    IMPORTERS[kind](Path(config.path), directory, options)
    generator = load_generator(directory)
    if generator.network and not all(weight.isfinite().all() for weight in generator.network.parameters()):
        (directory / "generator.json").unlink()
        raise InputError(f"{config.path} has weights that are not finite: the model is damaged, import another one")
    parameters = sum(weight.numel() for weight in generator.network.parameters()) if generator.network else 0
    channels, height, width = generator.noise_shape
    low, high = generator.sigma_range
    say(f"  {kind}: {parameters:,} parameters, noise {height}x{width}x{channels}, levels {low:.3g} to {high:.3g}")
    say(f"  go on with --config {context.workspace.config} --workspace {context.workspace.root}")
    directory = local(directory)
    files = sorted(path for path in directory.rglob("*") if path.suffix in (".safetensors", ".json"))
    return Made(
        parameters, storage.digest(*((path.relative_to(directory).as_posix(), storage.file_digest(path)) for path in files))
    )


def kind_of_model(config: GeneratorConfig) -> str:
    """The kind of the model at ``config.path``; ``InputError`` if it is none that can be imported."""
    return detect(Path(config.path)) if config.kind == "auto" else config.kind


def model_files(path: str) -> list[tuple[str, int]]:
    """(relative name, bytes) of every file of the model at ``path``; ``InputError`` if it is not there any more."""
    root = Path(path)
    if not root.exists():
        raise InputError(f"generator.path: {path} does not exist; put the model back where it was imported from")
    files = [root] if root.is_file() else sorted(file for file in root.rglob("*") if file.is_file())
    return [(file.relative_to(root).as_posix(), file.stat().st_size) for file in files]


if __name__ == "__main__":
    from flows.cli import script

    script(__file__)
