"""What is remembered of devices, and what their sockets carried."""

from collections.abc import Iterable, Mapping

import sqlalchemy as sa

from liberatai_coordinator.store.database import Database, columns_of, upsert_many
from liberatai_coordinator.store.rows import DeviceRow, MarkRow, TombstoneRow, TrafficRow
from liberatai_coordinator.store.tables import (
    DEVICE_LABELS,
    DEVICE_MARKS,
    DEVICES,
    REFUSALS,
    SHADOWS,
    TOMBSTONES,
    TRAFFIC,
)
from liberatai_coordinator.store.writer import Latest, Writer
from liberatai_core.errors import NotFoundError


class DeviceStore:
    """Devices by name. What is heard of them all the time is written by the writer thread, many at once."""

    def __init__(self, database: Database, writer: Writer) -> None:
        self._database = database
        self._heard: Latest[str, DeviceRow] = Latest(database, _write_devices)
        self._traffic: Latest[str, TrafficRow] = Latest(database, _write_traffic)
        writer.look_after(self._heard)
        writer.look_after(self._traffic)

    def remember(self, device: DeviceRow) -> None:
        """Let a device be written within a second or so; never waits for the disk.

        Of a known one everything but `first_seen_s` and `reason` is replaced. If the disk is full it is tried
        again until it is written.
        """
        self._heard.put(device.id, device)

    def flush(self) -> None:
        """Write now what was remembered; waits for the disk.

        Raises:
            LiberataiError: not written; it is tried again by itself.
        """
        self._heard.flush()
        self._traffic.flush()

    def forget(self, names: Iterable[str]) -> None:
        """Forget devices that never were let in."""
        self._heard.flush()  # what was heard before must not come after this and bring them back
        gone = sa.delete(DEVICES).where(DEVICES.c.id == sa.bindparam("name"), DEVICES.c.status == "pending")
        rows = [{"name": name} for name in names]
        if rows:
            with self._database.write() as connection:
                connection.execute(gone, rows)

    def all(self) -> list[DeviceRow]:
        """Return all devices that are on the disk, sorted by name."""
        with self._database.read() as connection:
            rows = connection.execute(sa.select(DEVICES).order_by(DEVICES.c.id)).mappings().all()
        return [DeviceRow(**row) for row in rows]

    def set_status(self, device: str, status: str, reason: str = "") -> None:
        """Change whether a device is let in, and why.

        Raises:
            NotFoundError: no such device.
        """
        self._heard.flush()  # what was heard before must not come after this and undo it
        change = sa.update(DEVICES).where(DEVICES.c.id == device).values(status=status, reason=reason)
        with self._database.write() as connection:
            if not connection.execute(change).rowcount:
                raise NotFoundError(f"device {device}: not known (see `liberatai devices list`)")

    def set_labels(self, device: str, changes: Mapping[str, str | None]) -> None:
        """Give a device labels, or take them away (None); those that are not named stay."""
        gone = [name for name, value in changes.items() if value is None]
        rows = [
            {"device": device, "name": name, "value": value}
            for name, value in changes.items()
            if value is not None
        ]
        mine = DEVICE_LABELS.c.device == device
        with self._database.write() as connection:
            if gone:
                connection.execute(sa.delete(DEVICE_LABELS).where(mine, DEVICE_LABELS.c.name.in_(gone)))
            upsert_many(connection, DEVICE_LABELS, rows, keys=("device", "name"))

    def labels(self) -> dict[str, dict[str, str]]:
        """Return the labels of all devices."""
        with self._database.read() as connection:
            rows = connection.execute(sa.select(DEVICE_LABELS)).mappings().all()
        found: dict[str, dict[str, str]] = {}
        for row in rows:
            found.setdefault(row["device"], {})[row["name"]] = row["value"]
        return found

    def mark(self, mark: MarkRow) -> None:
        """Remember what an operator says of a device."""
        with self._database.write() as connection:
            upsert_many(connection, DEVICE_MARKS, [columns_of(mark)], keys=("device", "mark"))

    def unmark(self, device: str, mark: str) -> None:
        """Forget what an operator said of a device."""
        gone = sa.delete(DEVICE_MARKS).where(DEVICE_MARKS.c.device == device, DEVICE_MARKS.c.mark == mark)
        with self._database.write() as connection:
            connection.execute(gone)

    def marks(self) -> list[MarkRow]:
        """Return what operators said of devices."""
        with self._database.read() as connection:
            rows = connection.execute(sa.select(DEVICE_MARKS)).mappings().all()
        return [MarkRow(**row) for row in rows]

    def tombstones(self) -> list[TombstoneRow]:
        """Return the keys that are refused for good."""
        with self._database.read() as connection:
            rows = connection.execute(sa.select(TOMBSTONES)).mappings().all()
        return [TombstoneRow(**row) for row in rows]

    def decommission(self, grave: TombstoneRow) -> None:
        """Forget a device and refuse its key for good, in one transaction."""
        self._heard.flush()  # what was heard before must not come after this and bring it back
        self._traffic.flush()
        with self._database.write() as connection:
            upsert_many(connection, TOMBSTONES, [columns_of(grave)], keys=("public_key",))
            for table, column in _OF_A_DEVICE:
                connection.execute(sa.delete(table).where(column == grave.device))

    def rekey(self, device: DeviceRow, grave: TombstoneRow) -> None:
        """Give a device another key, and refuse the one before for good, in one transaction."""
        self._heard.flush()
        with self._database.write() as connection:
            upsert_many(connection, TOMBSTONES, [columns_of(grave)], keys=("public_key",))
            connection.execute(sa.delete(TOMBSTONES).where(TOMBSTONES.c.public_key == device.public_key))
            upsert_many(connection, DEVICES, [columns_of(device)], keys=("id",), keep=("first_seen_s",))

    def set_traffic(self, rows: Iterable[TrafficRow]) -> None:
        """Let it be written within a second or so what devices' sockets carried; never waits for the disk."""
        for row in rows:
            self._traffic.put(row.device, row)

    def traffic(self) -> dict[str, TrafficRow]:
        """Return what `set_traffic` remembered, by device."""
        with self._database.read() as connection:
            rows = connection.execute(sa.select(TRAFFIC)).mappings().all()
        return {row["device"]: TrafficRow(**row) for row in rows}


_OF_A_DEVICE = (
    (DEVICES, DEVICES.c.id),
    (DEVICE_LABELS, DEVICE_LABELS.c.device),
    (DEVICE_MARKS, DEVICE_MARKS.c.device),
    (SHADOWS, SHADOWS.c.device),
    (TRAFFIC, TRAFFIC.c.device),
    (REFUSALS, REFUSALS.c.device),
)
"""What is forgotten with a device. Its updates stay: versions were made of them."""


def _write_devices(connection: sa.Connection, devices: dict[str, DeviceRow]) -> None:
    rows = [columns_of(device) for device in devices.values()]
    upsert_many(connection, DEVICES, rows, keys=("id",), keep=("first_seen_s", "reason"))


def _write_traffic(connection: sa.Connection, traffic: dict[str, TrafficRow]) -> None:
    upsert_many(connection, TRAFFIC, [columns_of(row) for row in traffic.values()], keys=("device",))
