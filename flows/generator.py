"""generator: the model that mixes, imported or trained here. The verbs fit-generator and import-generator run this one stage."""

from dataclasses import asdict
from typing import Any

from csm.errors import InputError
from csm.generators.config import GeneratorConfig
from csm.generators.importing import IMPORTERS
from csm.storage import digest
from flows.artifacts import StageRecord
from flows.config import Config
from flows.fit_generator import fit_generator
from flows.import_generator import import_generator, kind_of_model, model_files
from flows.stages import Context, Made, Stage

UNGUIDED = ("edm", "diffusers-unet")  # kinds of imported models that know no images without a class
IMPORT_SETTINGS = ("path", "kind", "classes", "guidance", "prompt")


def check_generator(verb: str, config: GeneratorConfig) -> None:
    """``InputError`` if ``verb`` cannot make the generator of ``config``: before anything is read or written."""
    imports = config.kind in IMPORTERS
    if not config.path:
        if verb == "import-generator":
            raise InputError("import-generator: say which model, as `csm import-generator PATH` or with generator.path")
        if imports:
            raise InputError(f"generator.path: missing; a generator of kind {config.kind} is imported")
        return
    if verb == "fit-generator":
        raise InputError(f"fit-generator: generator.path is {config.path}, a model to import: use `csm import-generator`")
    if config.kind != "auto" and not imports:
        raise InputError(f"generator.kind: {config.kind} is made here, not imported from {config.path}")
    kind_of_model(config)


def _check(context: Context) -> None:
    config = context.config
    if config.generator.kind == "truth" and not context.workspace.truth.is_dir():
        raise InputError("generator.kind: truth needs data whose law is known: set data.source=gaussians, or another kind")
    if config.guidance != 1 and config.generator.path and (kind := kind_of_model(config.generator)) in UNGUIDED:
        raise InputError(
            f"mix.guidance: expected 1, got {config.guidance:g}: a model of kind {kind} has no condition of no class"
        )


def _run(context: Context, record: StageRecord) -> Made:
    return import_generator(context, record) if context.config.generator.path else fit_generator(context, record)


def _settings(config: Config) -> dict[str, Any]:
    generator = asdict(config.generator)
    if config.generator.path:
        files = model_files(config.generator.path)
        return {"generator": {name: generator[name] for name in IMPORT_SETTINGS}, "files": f"{len(files)} files, {digest(files)}"}
    if config.generator.kind in ("gaussians", "truth"):
        return {"generator": {"kind": config.generator.kind}}
    # Like the number of workers, micro_batch changes the order of sums only, so a training may go on with a smaller one.
    left_out = {*IMPORT_SETTINGS, "micro_batch"} | (set() if generator["label_dropout"] else {"label_dropout"})  # a later setting
    return {"generator": {name: value for name, value in generator.items() if name not in left_out}}


STAGE = Stage(
    name="generator",
    unit="parameters",
    code_version=1,
    inputs=("prepare",),
    settings=_settings,
    outputs=lambda workspace, config: [workspace.generator],
    check=_check,
    run=_run,
    costly=True,
)
