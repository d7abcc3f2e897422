"""Verify a released folder, and upload it to the Hugging Face hub.

python -m easyaira.push FOLDER --repo owner/name [--private]
"""

from __future__ import annotations

from easyaira import cli
from easyaira.config.run import is_repo
from easyaira.errors import ConfigError
from easyaira.files import named_path
from easyaira.short_help import Parser


def parser() -> Parser:
    made = Parser(description=__doc__)
    made.add_argument("folder", type=str, help="Released folder, such as RUN/hf.")
    made.add_argument("--repo", required=True, help="Repository on the hub: owner/name.")
    made.add_argument("--private", action="store_true", help="Make a new repository private.")
    cli.debug_option(made)
    return made


def main(argv: list[str]) -> None:
    args = cli.parse_args(parser(), argv)
    folder = named_path(args.folder)
    if not (folder / "proof.json").exists():
        raise ConfigError(f"{folder}: holds no release with a proof.json; name one, such as RUN/hf")
    if not is_repo(args.repo):
        raise ConfigError(f"--repo: expected owner/name, got {args.repo!r:.80}")

    from easyaira.export import hub

    hub.check(args.repo)
    print(f"pushed  {hub.push(folder, args.repo, args.private or None)}")


if __name__ == "__main__":
    cli.run_command(main)
