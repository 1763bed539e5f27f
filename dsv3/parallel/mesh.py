"""Devices: the only room that asks which there are.

For now a run uses the default device of its process. What is rarely read and large, the average of
the parameters, lives in that device's host memory (§3.2.3).
"""

import jax


def host_sharding() -> jax.sharding.Sharding:
    """Placement in the pinned host memory of the default device."""
    device = jax.local_devices()[0]
    return jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")


def platform() -> str:
    """'cpu', 'gpu' or 'tpu': what the default devices are."""
    return jax.default_backend()
