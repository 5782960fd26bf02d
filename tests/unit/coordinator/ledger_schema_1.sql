-- The tables of the first release's ledger, as SQLite has them.
PRAGMA auto_vacuum = INCREMENTAL;
PRAGMA journal_mode = WAL;
PRAGMA application_id = 1279346993;
PRAGMA user_version = 1;
CREATE TABLE meta (
	"key" TEXT NOT NULL,
	value INTEGER NOT NULL,
	PRIMARY KEY ("key")
)
 STRICT;
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
)
 STRICT;
CREATE TABLE jobs (
	name TEXT NOT NULL,
	spec BLOB NOT NULL,
	base_dir TEXT NOT NULL,
	state TEXT NOT NULL,
	reason TEXT NOT NULL,
	created_s REAL NOT NULL,
	PRIMARY KEY (name)
)
 STRICT;
CREATE TABLE versions (
	model TEXT NOT NULL,
	number INTEGER NOT NULL,
	id TEXT NOT NULL,
	parent TEXT,
	manifest BLOB NOT NULL,
	created_s REAL NOT NULL,
	PRIMARY KEY (model, number),
	UNIQUE (model, id)
)
 STRICT;
CREATE TABLE refusals (
	device TEXT NOT NULL,
	code TEXT NOT NULL,
	count INTEGER NOT NULL,
	PRIMARY KEY (device, code)
)
 STRICT;
CREATE TABLE traffic (
	device TEXT NOT NULL,
	sent_bytes INTEGER NOT NULL,
	received_bytes INTEGER NOT NULL,
	session INTEGER NOT NULL,
	session_sent INTEGER NOT NULL,
	session_received INTEGER NOT NULL,
	PRIMARY KEY (device)
)
 STRICT;
CREATE TABLE job_values (
	job TEXT NOT NULL,
	"key" TEXT NOT NULL,
	value BLOB NOT NULL,
	PRIMARY KEY (job, "key"),
	FOREIGN KEY(job) REFERENCES jobs (name)
)
 STRICT;
CREATE TABLE rounds (
	job TEXT NOT NULL,
	round INTEGER NOT NULL,
	epoch INTEGER NOT NULL,
	state TEXT NOT NULL,
	reason TEXT NOT NULL,
	opened_s REAL NOT NULL,
	invited BLOB NOT NULL,
	frozen BLOB NOT NULL,
	frozen_sha256 BLOB NOT NULL,
	version_id TEXT NOT NULL,
	stats BLOB NOT NULL,
	PRIMARY KEY (job, round),
	FOREIGN KEY(job) REFERENCES jobs (name)
)
 STRICT;
CREATE TABLE tags (
	model TEXT NOT NULL,
	tag TEXT NOT NULL,
	number INTEGER NOT NULL,
	PRIMARY KEY (model, tag),
	FOREIGN KEY(model, number) REFERENCES versions (model, number)
)
 STRICT;
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
)
 STRICT;
CREATE TABLE paths (
	job TEXT NOT NULL,
	device TEXT NOT NULL,
	path BLOB NOT NULL,
	PRIMARY KEY (job, device),
	FOREIGN KEY(job) REFERENCES jobs (name)
)
 STRICT;
CREATE TABLE updates (
	update_id BLOB NOT NULL,
	job TEXT NOT NULL,
	round INTEGER NOT NULL,
	device TEXT NOT NULL,
	structure TEXT NOT NULL,
	samples INTEGER NOT NULL,
	sha256 BLOB NOT NULL,
	frame BLOB,
	received_s REAL NOT NULL,
	PRIMARY KEY (update_id),
	UNIQUE (job, round, device),
	FOREIGN KEY(job, round) REFERENCES rounds (job, round)
)
 STRICT;
