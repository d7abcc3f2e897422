"""Check a released folder against its own proof, or a run's checkpoints against their checksums.

python -m easyaira.verify FOLDER [--json]

Compares every tensor, every file of configuration and tokenizer, the figures of the model card and
an adapter's base with proof.json; and, where PyTorch is installed, the logits on fixed prompts. A
release inside its run folder is also compared with the records of the run. Of a run folder, every
array of every checkpoint is compared. Prints a line for each check; exits with 0, or with 2 if
something is not what was released or saved.
"""

from __future__ import annotations

import json

from easyaira import cli
from easyaira.errors import CheckFailed, ConfigError, escaped
from easyaira.files import named_path
from easyaira.short_help import Parser

WORDS = {True: "ok", False: "WRONG", None: "skipped"}


def main(argv: list[str]) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("folder", type=str, help="Released folder, such as RUN/hf; or a run.")
    parser.add_argument("--json", action="store_true", help="Print the checks as a JSON object.")
    cli.debug_option(parser)
    args = cli.parse_args(parser, argv)
    folder = named_path(args.folder)
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; name a release, such as RUN/hf")

    from easyaira.export import checks, run_check
    from easyaira.storage import pretrained

    saved = not (folder / "proof.json").exists() and pretrained.find(str(folder)).step is not None
    if saved:
        results = list(run_check.verify(pretrained.checkpoint_dir(folder)))
    else:
        results = checks.verify(folder)
    wrong = [result.check for result in results if result.ok is False]
    if args.json:
        content = {"folder": args.folder, "ok": not wrong}
        content["checks"] = [result._asdict() for result in results]
        print(json.dumps(content, indent=2, ensure_ascii=False))
    else:
        for result in results:
            print(f"{WORDS[result.ok]:8}{result.check:9}{escaped(result.message)}")
    if wrong:
        was = "saved: checkpoints" if saved else "released:"
        raise CheckFailed(f"{folder}: not what was {was} {', '.join(wrong)}")


if __name__ == "__main__":
    cli.run_command(main)
