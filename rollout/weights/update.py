"""What every update of weights does around the sending: pause, no version, then the new version, continue."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from rollout.sglang.control import ServerRefused
from rollout.weights.server_set import ServerSet
from rollout.weights.weight_sync import InFlight, WeightSyncFailed


@contextmanager
def update(servers: ServerSet, policy_version: int, in_flight: InFlight) -> Iterator[None]:
    """Pause before the update, set the version and continue after it. On failure members stay paused, with a version no client asks for."""
    unusable = f"{uuid.uuid4().hex[:8]} of an unfinished update to {policy_version}"
    try:
        servers.may_hold(unusable, str(policy_version))
        servers.tell("/pause_generation", {"mode": in_flight})
        # Without aborting: by default this call would end every response in flight.
        servers.tell("/update_weight_version", {"new_version": unusable, "abort_all_requests": False})
        yield
        servers.tell_all("/update_weight_version", {"new_version": str(policy_version), "abort_all_requests": False})
        servers.check_versions(policy_version)
        servers.tell("/continue_generation", {})
        servers.hold(str(policy_version))
    except ServerRefused as refused:
        # Those that have taken the version already are paused as well: a client that asked them would never get an answer.
        servers.try_to_tell("/update_weight_version", {"new_version": unusable, "abort_all_requests": False})
        raise WeightSyncFailed(f"policy version {policy_version}: no server took it: {refused}") from refused
