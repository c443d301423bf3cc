"""ekd_ray: search the best way to distil a big image classifier into a small one."""

from ekd_ray.config import method_settings

__version__ = "0.1.0"

# Imported when the settings of methods are first asked for, because it loads torch.
method_settings.PROVIDERS.append("ekd_ray.losses")
