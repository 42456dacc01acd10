"""For Hypothesis: a property is about what is computed, never about how fast; otherwise a machine that stands
still for a moment would fail one."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

settings.register_profile("milepost", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("milepost")
