"""What SAM makes of a template, as JSON: `.venv-aws/cfn/bin/python scripts/sam_transform.py TEMPLATE`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from samcli.yamlhelper import yaml_parse
from samtranslator.parser.parser import Parser
from samtranslator.translator.translator import Translator

REGION = "us-east-1"


def main(file: str) -> None:
    """Print what CloudFormation would be given. Asks nobody: the template uses no policy by its name."""
    os.environ["AWS_DEFAULT_REGION"] = REGION
    template = yaml_parse(Path(file).read_text())
    given = {name: row["Default"] for name, row in template["Parameters"].items() if "Default" in row}
    print(json.dumps(Translator({}, Parser()).translate(template, given)))


if __name__ == "__main__":
    main(*sys.argv[1:])
