"""`python -m ekd_ray.config`: the JSON Schema of recipes, for an editor's completion and checks."""

import json
import sys

from ekd_ray.config import DistillConfig, StudyConfig, json_schema

shown = DistillConfig if sys.argv[1:] == ["DistillConfig"] else StudyConfig
print(json.dumps(json_schema(shown), indent=2))
