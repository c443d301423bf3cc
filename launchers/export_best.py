"""Export the confirmed winner of a study as a bundle: weights, configuration, evidence."""

from __future__ import annotations

import argparse

from ekd_ray import cli


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="folder of a finished study")
    parser.add_argument("--out", required=True, help="folder to write the bundle to")
    parser.add_argument("--data-root", metavar="DIR", help="folder of the data sets, for --verify")
    parser.add_argument(
        "--verify", action="store_true", help="also evaluate the stored weights on the test split"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be exported")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    parser.add_argument("--json", action="store_true", help="results as JSON on standard output")
    args = parser.parse_args()

    from ekd_ray import commands

    return commands.export(args)


if __name__ == "__main__":
    cli.run(main)
