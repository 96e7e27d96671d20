"""Print the resolved configuration: python -m megatron_minpro.config CONFIG [key=value ...] (job scripts save it beside the run)."""

from __future__ import annotations

import sys

from megatron_minpro.config.loading import ConfigError, dump_config, load_config


def main(arguments: list[str]) -> int:
    """Exit code 2 and one line on stderr when the configuration cannot be used."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: python -m megatron_minpro.config CONFIG [key=value ...]")
        return 0 if arguments else 2
    try:
        print(dump_config(load_config(arguments[0], arguments[1:])), end="")
    except ConfigError as error:
        print(f"minpro: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
