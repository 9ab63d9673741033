"""Storage of finished files in a bucket (`worker.backblaze`) or in the local folder. Knows no downloads, no jobs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from musetalk.errors import ProcessingError
from musetalk.files import replacing
from worker.config import Settings
from worker.stored import Store, StoredObject, TimeLimit, disk_errors, object_name, sha1_of, sidecar_bytes

logger = logging.getLogger("musetalk.storage")


@dataclass(frozen=True)
class LocalStoreSettings:
    """Folder of finished files, and the worker's own address, which serves them at `/outputs/`."""

    folder: Path
    public_base_url: str


def open_store(settings: Settings) -> Store:
    """Return the bucket if the settings name one, else the local folder. Raises SettingsError for a prefix too long."""
    if not settings.uses_b2:
        return LocalStore(LocalStoreSettings(settings.output_dir, settings.public_base_url))
    from worker.backblaze import B2Settings, B2Store  # without a bucket b2sdk is not loaded

    return B2Store(
        B2Settings(
            key_id=settings.b2_key_id,
            app_key=settings.b2_app_key,
            bucket=settings.b2_bucket,
            prefix=settings.b2_prefix,
            realm=settings.b2_realm,
            link_lifetime_s=settings.b2_link_lifetime_s,
        )
    )


class LocalStore:
    """Folder that the worker serves at `{public_base_url}/outputs/<name>`; files appear whole or not at all."""

    def __init__(self, settings: LocalStoreSettings) -> None:
        self.folder = settings.folder
        self.public_base_url = settings.public_base_url.rstrip("/")

    def check(self) -> None:
        """Do nothing: the worker checks all its folders at startup."""

    def upload(
        self,
        path: Path,
        job_id: str | None,
        sidecar: Mapping[str, object],
        *,
        deadline_s: float,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> StoredObject:
        """Copy the MP4 into the folder; see Store.upload."""
        limit = TimeLimit(deadline_s, should_stop)
        name = object_name("", job_id)
        limit.check()
        with disk_errors():
            self.folder.mkdir(parents=True, exist_ok=True)
        with disk_errors(), replacing(self.folder / name) as temporary, temporary.open("xb") as copy:
            sha1, n_bytes = sha1_of(path, limit, copy.write)
        stored = StoredObject(name, f"{self.public_base_url}/outputs/{quote(name)}", n_bytes, sha1, None)
        # The video is stored: a job must not run again for its sidecar.
        try:
            sidecar_path = self.folder / (name.removesuffix(".mp4") + ".json")
            with disk_errors(), replacing(sidecar_path) as temporary:
                temporary.write_bytes(sidecar_bytes(sidecar, stored))
        except (ProcessingError, TypeError, ValueError) as problem:
            logger.warning("sidecar not stored", extra={"reason": str(problem)})
        return stored
