"""Convert between Hugging Face folders and EasyAira checkpoints.

python -m easyaira.convert to_hf   RUN_OR_CHECKPOINT OUT_FOLDER
python -m easyaira.convert from_hf HF_FOLDER_OR_ID   OUT_FOLDER
python -m easyaira.convert from_easylm CHECKPOINT HF_FOLDER_OR_ID OUT_FOLDER
python -m easyaira.convert text_model HF_FOLDER_OR_ID OUT_FOLDER
"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Literal

from easyaira import cli
from easyaira.short_help import Parser

MERGE = "Merge adapters into their base weights."
OVERWRITE = "Replace an existing model folder once the new one is complete."


def to_hf(
    source: str,
    out: str,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    merge: bool = False,
    overwrite: bool = False,
) -> None:
    """Write a run, or one of its checkpoints, as a verified Hugging Face folder.

    A LoRA run becomes an adapter in PEFT's format, or a model if merged.

    Args:
        source: Run folder (for its best checkpoint if it looks for one, else the newest), or its
            subfolder checkpoints/STEP.
        out: New folder.
        dtype: Data type of the stored weights; default: that of the model the run started from.
        merge: see MERGE.
        overwrite: see OVERWRITE.
    """
    import jax

    from easyaira.distributed import mesh as meshes
    from easyaira.errors import ConfigError
    from easyaira.export import release
    from easyaira.export.hf_config import Facts
    from easyaira.export.records import Records
    from easyaira.export.replace import target
    from easyaira.lora.adapter import of_record
    from easyaira.models.registry import model_of
    from easyaira.storage import pretrained
    from easyaira.storage.base import load_base

    origin = pretrained.find(source)
    if origin.step is None:
        raise ConfigError(
            f"{source}: is not a run folder or one of its checkpoints; name the run that it is from"
        )
    if merge and origin.adapter is None:
        raise ConfigError(f"merge: {source} has no adapters; leave --merge out")
    adapter_only = origin.adapter is not None and not merge
    if adapter_only and dtype:
        raise ConfigError("dtype: an adapter is stored in float32; leave it out, or add --merge")
    folder = target(out, origin, overwrite)
    model = model_of(origin.config, source)
    mesh = meshes.make_mesh("fsdp=-1")
    records = Records(origin.folder, origin.step)
    records.check()  # before any weight is read
    common = {"tokenizer": origin.tokenizer(), "mesh": mesh, "records": records}
    with jax.set_mesh(mesh):
        if adapter_only:
            adapter = of_record(origin.adapter, model)
            params = origin.load_adapter(adapter, mesh)
            load_base(origin, adapter, mesh)  # raises if it has changed
            report = release.export_adapter(
                folder, adapter=adapter, params=params, base=origin.base, **common
            )
        else:
            report = release.export(
                folder,
                model=model,
                params=origin.lazy(model, mesh),
                facts=Facts.of(origin),
                dtype=dtype,
                **common,
            )
    held = origin.adapter and origin.adapter["config"]["quantize"]
    if merge and held:
        print(
            f"note: the adapter was trained on a base in {held}; expect slightly different logits"
        )
    print(f"{out}: {release.summary(report)}")


def from_hf(source: str, out: str, revision: str | None = None, overwrite: bool = False) -> None:
    """Write a Hugging Face model as a folder that runs can start from and to_hf can read.

    Args:
        source: Hugging Face folder or hub id.
        out: New folder.
        revision: Branch, tag or commit of a hub id.
        overwrite: see OVERWRITE.
    """
    from easyaira import __version__
    from easyaira.distributed import mesh as meshes
    from easyaira.errors import ConfigError
    from easyaira.export.hf_config import Facts
    from easyaira.export.replace import replacing, target
    from easyaira.models.registry import model_of
    from easyaira.storage import pretrained
    from easyaira.storage.checkpoints import Checkpoints
    from easyaira.storage.tokenizers import save_tokenizer

    origin = pretrained.find(source, revision)
    if origin.step is not None:
        raise ConfigError(f"{source}: is already a run folder; use it as it is, or to_hf")
    folder = target(out, origin, overwrite)
    model = model_of(origin.config, source)
    origin.check(model)
    tokenizer = origin.tokenizer()
    mesh = meshes.make_mesh("fsdp=-1")
    params = origin.lazy(model, mesh)
    meta = Facts.of(origin).to_meta() | {"easyaira": __version__, "source": origin.commit or source}
    with replacing(folder) as new:
        save_tokenizer(tokenizer, new / pretrained.TOKENIZER)
        with closing(Checkpoints(new / pretrained.CHECKPOINTS, write=True)) as checkpoints:
            checkpoints.save_params(0, params, meta)
    rounded = ", rounded from float64 to float32" if origin.is_rounded() else ""
    print(f"{out}: {model.parameter_count():,} parameters from {source}{rounded}")


def from_easylm(
    source: str,
    like: str,
    out: str,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    revision: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write a checkpoint of EasyLM's StreamingCheckpointer as a verified Hugging Face folder.

    Args:
        source: EasyLM's file streaming_params or streaming_train_state.
        like: Hugging Face folder or hub id of a model of the same sizes, for config.json and
            tokenizer.
        out: New folder.
        dtype: Data type of the stored weights; default: that of the checkpoint.
        revision: Branch, tag or commit of a hub id.
        overwrite: see OVERWRITE.
    """
    import jax

    from easyaira.distributed import mesh as meshes
    from easyaira.errors import ConfigError
    from easyaira.export import release
    from easyaira.export.hf_config import Facts, with_dtype
    from easyaira.export.records import Records
    from easyaira.export.replace import target
    from easyaira.hf import easylm, transfer
    from easyaira.models.registry import model_of
    from easyaira.storage import pretrained

    origin = pretrained.find(like, revision, weights_wanted=False)
    folder = target(out, origin, overwrite)
    model = model_of(origin.config, origin.where)
    known = model.architecture.easylm_rows
    ours = {row.ours: row for row in model.rows}
    rows = [row for row in (known(model.config) if known else ()) if row.ours in ours]
    if lacking := ours.keys() - {row.ours for row in rows}:
        kind = f"with {min(lacking)}, which EasyLM's checkpoints lack"
        if known is None:
            kind = (
                f"of type {origin.config['model_type']}, and EasyLM's checkpoints are read as llama"
            )
        raise ConfigError(
            f"{origin.where}: describes a model {kind}; name the model that EasyLM trained"
        )
    tensors = transfer.match(
        easylm.open_stream(source),
        model.shapes,
        rows,
        vocab_size=model.vocab_size,
        prefix="",
        ignored=(),
        renamed={},
        optional=(),
        tied=False,
        where=source,
    )
    paired = transfer.pair_rows(model.shapes, rows)
    dtypes = pretrained.without_most_common(
        {
            theirs: tensors[name].dtype.name
            for row, leaf in paired
            for theirs, name in zip(ours[row.ours].names(leaf), row.names(leaf), strict=True)
        }
    )
    mesh = meshes.make_mesh("fsdp=-1")
    with jax.set_mesh(mesh):
        report = release.export(
            folder,
            model=model,
            params=transfer.lazy_from_hf(tensors, model.shapes, rows, where=source),
            facts=Facts(with_dtype(origin.config, dtypes[""]), origin.generation_config, dtypes),
            tokenizer=origin.tokenizer(),
            mesh=mesh,
            records=Records(Path(source), 0),
            dtype=dtype,
        )
    print(f"{out}: {release.summary(report)}")


def text_model(source: str, out: str, revision: str | None = None, overwrite: bool = False) -> None:
    """Write the text model of a model for images or sound as a Hugging Face folder of its own.

    Args:
        source: Hugging Face folder or hub id, whose config.json has a text_config.
        out: New folder.
        revision: Branch, tag or commit of a hub id.
        overwrite: see OVERWRITE.
    """
    from easyaira.errors import ConfigError
    from easyaira.export import release
    from easyaira.export import text_model as parts
    from easyaira.export.replace import target
    from easyaira.storage import pretrained

    origin = pretrained.find(source, revision)
    if origin.step is not None:
        raise ConfigError(
            f"{source}: is a run folder, which holds text models only; use it as it is"
        )
    folder = target(out, origin, overwrite)
    text = parts.text_model(origin)
    tokenizer = parts.tokenizer_of(origin)
    files = (text.config, origin.generation_config, tokenizer)
    verified = release.copy(folder, text.tensors, *files)
    without = f" without {', '.join(text.left_out)}" if text.left_out else ""
    print(f"{out}: {text.model.parameter_count():,} parameters from {source}{without}; {verified}")


COMMANDS = (to_hf, from_hf, from_easylm, text_model)


def main(argv: list[str]) -> None:
    parser = Parser(description=__doc__)
    cli.debug_option(parser)
    commands = parser.add_subcommands(required=True, dest="command")
    for command in COMMANDS:
        sub = Parser(description=command.__doc__)
        sub.add_function_arguments(command, as_positional=True, skip={"merge", "overwrite"})
        if command is to_hf:
            sub.add_argument("--merge", action="store_true", help=MERGE)
        sub.add_argument("--overwrite", action="store_true", help=OVERWRITE)
        cli.debug_option(sub)
        commands.add_subcommand(command.__name__, sub, help=command.__doc__.splitlines()[0])
    args = cli.parse_args(parser, argv)
    command = {command.__name__: command for command in COMMANDS}[args.command]
    options = vars(args[args.command])
    del options["debug"]  # read by cli.run_command
    command(**options)


if __name__ == "__main__":
    cli.run_command(main)
