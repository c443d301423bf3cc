"""Every setting of a run (`DistillConfig`) and of a study (`StudyConfig`), and their files."""

from ekd_ray.config.distill_config import DistillConfig
from ekd_ray.config.settings import json_schema
from ekd_ray.config.study_config import StudyConfig
from ekd_ray.config.yaml_files import YamlFile, parse_yaml

__all__ = ["DistillConfig", "StudyConfig", "YamlFile", "json_schema", "parse_yaml"]
