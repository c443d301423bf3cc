"""Train the run of a bundle again and say whether the same came out."""

from __future__ import annotations

from ekd_ray import cli, flags


def main() -> int:
    args = flags.reproduce_parser(__doc__).parse_args()

    from ekd_ray import reproduce_command

    return reproduce_command.run(args)


if __name__ == "__main__":
    cli.run(main)
