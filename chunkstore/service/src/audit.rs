//! A line for each administrative act: who, what, when, in which request, and how it ended.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;
use serde::Serialize;

/// An administrative act.
#[derive(Debug, Clone, Serialize)]
pub struct Act {
    /// The tenant whose token it was, or `signal` or `file` for what came from the machine itself.
    pub who: String,
    /// What was done: `rotate-root`, `acknowledge`, `gc`, `reload-tenants`.
    pub what: &'static str,
    /// On what, with which settings.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub on: Option<String>,
    /// The request's id.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub request: Option<String>,
    /// `done`, or the code of the error.
    pub outcome: &'static str,
}

#[derive(Serialize)]
struct Line<'a> {
    at: String,
    #[serde(flatten)]
    act: &'a Act,
}

/// Where the lines go: a file of their own, or the log.
#[derive(Debug, Clone, Default)]
pub struct Audit(Option<Arc<Mutex<AuditFile>>>);

#[derive(Debug)]
struct AuditFile {
    path: PathBuf,
    file: File,
}

impl Audit {
    /// Lines go to the log, as `audit` events.
    pub fn to_log() -> Self {
        Self(None)
    }

    /// Lines are appended to a file, which is made with mode 0600. A file that was renamed or removed
    /// is made anew, so that others can rotate it.
    ///
    /// # Errors
    /// When it can't be opened for appending.
    pub fn to_file(path: &Path) -> io::Result<Self> {
        let file = AuditFile {
            path: path.to_owned(),
            file: open(path)?,
        };
        Ok(Self(Some(Arc::new(Mutex::new(file)))))
    }

    /// Writes the line, and has it on disk when it returns. What can't be written goes to the log,
    /// with the reason: the act has happened.
    pub async fn record(&self, act: Act) {
        let Some(file) = self.0.clone() else {
            log(&act);
            return;
        };
        let write = move || {
            let mut file = file.lock();
            if let Err(cause) = append(&mut file, &act) {
                log(&act);
                let path = file.path.display();
                tracing::error!("audit log {path}: {cause}; the line went to this log");
            }
        };
        if tokio::task::spawn_blocking(write).await.is_err() {
            tracing::error!("an audit line was lost: writing it panicked");
        }
    }
}

fn log(act: &Act) {
    tracing::info!(
        target: "lazyimg_store::audit",
        who = %act.who,
        what = act.what,
        on = act.on.as_deref(),
        request = act.request.as_deref(),
        outcome = act.outcome,
        "audit"
    );
}

fn open(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.append(true).create(true).mode(0o600).open(path)
}

fn append(to: &mut AuditFile, act: &Act) -> io::Result<()> {
    let place = |meta: std::fs::Metadata| (meta.dev(), meta.ino());
    if std::fs::metadata(&to.path).ok().map(place) != Some(place(to.file.metadata()?)) {
        to.file = open(&to.path)?;
    }
    let at = rfc3339(SystemTime::now());
    let mut line = serde_json::to_vec(&Line { at, act })?;
    line.push(b'\n');
    to.file.write_all(&line)?;
    to.file.sync_data()
}

/// A time as `2026-11-21T17:16:28.123Z`.
fn rfc3339(time: SystemTime) -> String {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let (days, second) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    // Days to a date: Howard Hinnant's `civil_from_days`, for days after 1970. The year begins in March.
    let day = days + 719_468;
    let (era, day) = (day / 146_097, day % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = year + era * 400 + u64::from(month <= 2);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    let milli = since.subsec_millis();
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{milli:03}Z")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::time::Duration;

    #[test]
    fn times_are_dates() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_400, "2000-02-29T00:00:00.000Z"),
            (1_709_251_199, "2024-02-29T23:59:59.000Z"),
            (1_735_689_599, "2024-12-31T23:59:59.000Z"),
            (4_107_542_400, "2100-03-01T00:00:00.000Z"),
        ] {
            let time = UNIX_EPOCH + Duration::from_secs(seconds);
            assert_eq!(rfc3339(time), text);
        }
    }

    #[tokio::test]
    async fn each_act_is_one_line_that_only_the_owner_reads_also_after_a_rotation() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("audit.log");
        let audit = Audit::to_file(&path).unwrap();
        let act = Act {
            who: "alpha".into(),
            what: "rotate-root",
            on: Some("r00000002\n\"".into()),
            request: Some("0123456789abcdef".into()),
            outcome: "done",
        };
        audit.record(act.clone()).await;
        audit.record(act.clone()).await;
        let moved = dir.path().join("audit.log.1");
        std::fs::rename(&path, &moved).unwrap();
        audit.record(act).await;
        let old = std::fs::read_to_string(&moved).unwrap();
        let new = std::fs::read_to_string(&path).unwrap();
        assert_eq!((old.lines().count(), new.lines().count()), (2, 1));
        let line: serde_json::Value = serde_json::from_str(&new).unwrap();
        assert_eq!(line["who"], "alpha");
        assert_eq!(line["what"], "rotate-root");
        assert_eq!(line["on"], "r00000002\n\"");
        assert_eq!(line["request"], "0123456789abcdef");
        assert_eq!(line["outcome"], "done");
        assert!(line["at"].as_str().unwrap().ends_with('Z'));
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }
}
