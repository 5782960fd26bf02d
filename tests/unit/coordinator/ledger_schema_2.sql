-- The tables of the second schema, as SQLite has them.
PRAGMA auto_vacuum = INCREMENTAL;
PRAGMA journal_mode = WAL;
PRAGMA application_id = 1279346993;
PRAGMA user_version = 2;
CREATE TABLE devices (
    id TEXT NOT NULL,
    public_key BLOB NOT NULL,
    status TEXT NOT NULL,
    reason TEXT NOT NULL,
    capability BLOB,
    session INTEGER NOT NULL,
    first_seen_s REAL NOT NULL,
    last_seen_s REAL NOT NULL,
    PRIMARY KEY (id)
) STRICT;
CREATE TABLE jobs (
    name TEXT NOT NULL,
    spec BLOB NOT NULL,
    base_dir TEXT NOT NULL,
    state TEXT NOT NULL,
    reason TEXT NOT NULL,
    created_s REAL NOT NULL,
    first_version INTEGER DEFAULT '0' NOT NULL,
    PRIMARY KEY (name)
) STRICT;
CREATE TABLE meta (
    "key" TEXT NOT NULL,
    value INTEGER NOT NULL,
    PRIMARY KEY ("key")
) STRICT;
CREATE TABLE refusals (
    device TEXT NOT NULL,
    code TEXT NOT NULL,
    count INTEGER NOT NULL,
    PRIMARY KEY (device, code)
) STRICT;
CREATE TABLE senders (
    no INTEGER NOT NULL,
    device TEXT NOT NULL,
    updates INTEGER NOT NULL,
    PRIMARY KEY (no),
    UNIQUE (device)
) STRICT;
CREATE TABLE traffic (
    device TEXT NOT NULL,
    sent_bytes INTEGER NOT NULL,
    received_bytes INTEGER NOT NULL,
    session INTEGER NOT NULL,
    session_sent INTEGER NOT NULL,
    session_received INTEGER NOT NULL,
    PRIMARY KEY (device)
) STRICT;
CREATE TABLE update_frames (
    slot INTEGER NOT NULL,
    structure TEXT NOT NULL,
    samples INTEGER NOT NULL,
    received_s REAL NOT NULL,
    sha256 BLOB NOT NULL,
    frame BLOB NOT NULL,
    PRIMARY KEY (slot)
) STRICT;
CREATE TABLE update_keys (
    slot INTEGER NOT NULL,
    update_id BLOB NOT NULL,
    PRIMARY KEY (slot),
    UNIQUE (update_id)
) STRICT;
CREATE TABLE versions (
    model TEXT NOT NULL,
    number INTEGER NOT NULL,
    id TEXT NOT NULL,
    parent TEXT,
    manifest BLOB NOT NULL,
    created_s REAL NOT NULL,
    collected INTEGER DEFAULT '0' NOT NULL,
    PRIMARY KEY (model, number),
    UNIQUE (model, id)
) STRICT;
CREATE TABLE job_values (
    job TEXT NOT NULL,
    "key" TEXT NOT NULL,
    value BLOB NOT NULL,
    PRIMARY KEY (job, "key"),
    FOREIGN KEY(job) REFERENCES jobs (name)
) STRICT;
CREATE TABLE paths (
    job TEXT NOT NULL,
    device TEXT NOT NULL,
    path BLOB NOT NULL,
    PRIMARY KEY (job, device),
    FOREIGN KEY(job) REFERENCES jobs (name)
) STRICT;
CREATE TABLE rounds (
    no INTEGER NOT NULL,
    job TEXT NOT NULL,
    round INTEGER NOT NULL,
    epoch INTEGER NOT NULL,
    state TEXT NOT NULL,
    reason TEXT NOT NULL,
    opened_s REAL NOT NULL,
    asked INTEGER NOT NULL,
    updates INTEGER NOT NULL,
    pruned INTEGER DEFAULT '0' NOT NULL,
    version_id TEXT NOT NULL,
    frozen_sha256 BLOB NOT NULL,
    stats BLOB NOT NULL,
    frozen BLOB NOT NULL,
    invited BLOB NOT NULL,
    details BLOB NOT NULL,
    PRIMARY KEY (no),
    UNIQUE (job, round),
    FOREIGN KEY(job) REFERENCES jobs (name)
) STRICT;
CREATE TABLE tags (
    model TEXT NOT NULL,
    tag TEXT NOT NULL,
    number INTEGER NOT NULL,
    PRIMARY KEY (model, tag),
    FOREIGN KEY(model, number) REFERENCES versions (model, number)
) STRICT;
CREATE TABLE variants (
    model TEXT NOT NULL,
    id TEXT NOT NULL,
    number INTEGER NOT NULL,
    structure TEXT NOT NULL,
    size_bytes INTEGER NOT NULL,
    manifest BLOB NOT NULL,
    created_s REAL NOT NULL,
    PRIMARY KEY (model, id),
    FOREIGN KEY(model, number) REFERENCES versions (model, number)
) STRICT;
CREATE VIEW updates AS
SELECT update_id, job, round, device, structure, samples, sha256, frame, received_s
FROM update_keys
JOIN rounds ON rounds.no = update_keys.slot >> 24
JOIN senders ON senders.no = update_keys.slot & 16777215
LEFT JOIN update_frames ON update_frames.slot = update_keys.slot;
