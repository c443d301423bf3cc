"""ekd_ray: search the best way to distil a big image classifier into a small one."""

__version__ = "0.1.0"
