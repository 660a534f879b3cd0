//! The tenant's token, read from a file whenever that changes.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use parking_lot::Mutex;
use reqwest::header::HeaderValue;
use zeroize::Zeroizing;

use super::error::StoreError;

/// How often the file is looked at, at most.
const LOOK: Duration = Duration::from_secs(1);
/// Length of the longest token file, in bytes.
const MAX_FILE: u64 = 16 << 10;

/// Rights of others than the owner, in a file's mode.
const OTHERS: u32 = 0o077;

/// A token file, which only its owner may read. Never printed: it has no `Debug`.
pub(super) struct TokenFile {
    path: PathBuf,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    token: Option<Zeroizing<String>>,
    stamp: Option<Stamp>,
    looked: Option<Instant>,
    /// What is wrong with the file now, told once.
    wrong: Option<String>,
}

/// What tells one content of the file from another.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Stamp {
    modified: Option<SystemTime>,
    len: u64,
    inode: u64,
}

impl TokenFile {
    pub fn new(path: PathBuf) -> Self {
        Self {
            path,
            state: Mutex::default(),
        }
    }

    /// The header to send. The file is looked at once a second; `anew`: now. A file that cannot be
    /// read, or that others may read, leaves the token as it was.
    ///
    /// # Errors
    /// When there is no token at all, or what is there cannot be one.
    pub async fn header(&self, anew: bool) -> Result<HeaderValue, StoreError> {
        let due = {
            let mut state = self.state.lock();
            let due = anew || state.looked.is_none_or(|at| at.elapsed() >= LOOK);
            if due {
                state.looked = Some(Instant::now());
            }
            due || state.token.is_none()
        };
        if due {
            let known = self.state.lock().stamp;
            let path = self.path.clone();
            let read = tokio::task::spawn_blocking(move || read(&path, known))
                .await
                .map_err(|e| StoreError::token(&self.path, e))?;
            let mut state = self.state.lock();
            match read {
                Ok(Some((token, stamp))) => {
                    state.token = Some(token);
                    state.stamp = Some(stamp);
                    state.wrong = None;
                }
                Ok(None) => state.wrong = None,
                Err(error) if state.token.is_none() => {
                    return Err(StoreError::token(&self.path, error));
                }
                Err(error) => {
                    let error = error.to_string();
                    if state.wrong.as_ref() != Some(&error) {
                        tracing::warn!(path = %self.path.display(), error, "the store's token file cannot be used; going on with the token that was there");
                        state.wrong = Some(error);
                    }
                }
            }
        }
        let state = self.state.lock();
        let token = state.token.as_ref().map_or("", |token| token.as_str());
        let text = Zeroizing::new(format!("Bearer {token}"));
        let mut header =
            HeaderValue::from_str(&text).map_err(|e| StoreError::token(&self.path, e))?;
        header.set_sensitive(true);
        Ok(header)
    }
}

/// The token and its stamp, unless it has the stamp that is known.
fn read(path: &Path, known: Option<Stamp>) -> std::io::Result<Option<(Zeroizing<String>, Stamp)>> {
    use std::io::{Error, ErrorKind, Read};
    use std::os::unix::fs::MetadataExt;

    let bad = |reason: &str| Error::new(ErrorKind::InvalidData, reason.to_owned());
    let file = std::fs::File::open(path)?;
    // Of the file that is open: what has this name may be another one a moment later.
    let metadata = file.metadata()?;
    if metadata.is_file() && metadata.mode() & OTHERS != 0 {
        let mode = metadata.mode() & 0o777;
        let reason = format!(
            "its mode is {mode:04o}, and only its owner may have rights on it: chmod 600 it"
        );
        return Err(bad(&reason));
    }
    let stamp = Stamp {
        modified: metadata.modified().ok(),
        len: metadata.len(),
        inode: metadata.ino(),
    };
    if known == Some(stamp) {
        return Ok(None);
    }
    if !metadata.is_file() || metadata.len() > MAX_FILE {
        return Err(bad("not a file with one token"));
    }
    let mut text = Zeroizing::new(String::with_capacity(MAX_FILE as usize));
    file.take(MAX_FILE).read_to_string(&mut text)?;
    let token = Zeroizing::new(text.trim().to_owned());
    if token.is_empty() || !token.bytes().all(|b| b.is_ascii_graphic()) {
        return Err(bad(
            "not one token: empty, or with blanks or control characters",
        ));
    }
    Ok(Some((token, stamp)))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn write(path: &Path, text: impl AsRef<[u8]>) {
        std::fs::write(path, text).unwrap();
        set_mode(path, 0o600);
    }

    fn set_mode(path: &Path, mode: u32) {
        std::fs::set_permissions(path, PermissionsExt::from_mode(mode)).unwrap();
    }

    #[tokio::test]
    async fn a_token_that_others_may_read_is_refused_with_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("token");
        for mode in [0o644, 0o640, 0o602] {
            write(&path, "first\n");
            set_mode(&path, mode);
            let file = TokenFile::new(path.clone());
            let error = file.header(false).await.unwrap_err().to_string();
            assert!(error.contains("chmod 600"), "{error}");
            assert!(!error.contains("first"), "{error}");
            // It counts once it is closed to others, and is not read when it is opened to them.
            set_mode(&path, 0o600);
            assert_eq!(file.header(true).await.unwrap(), "Bearer first");
            write(&path, "second-and-longer\n");
            set_mode(&path, mode);
            assert_eq!(file.header(true).await.unwrap(), "Bearer first");
        }
    }

    #[tokio::test]
    async fn a_token_that_changes_is_sent_from_then_on_and_never_printed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("token");
        write(&path, "first\n");
        let file = TokenFile::new(path.clone());
        let header = file.header(false).await.unwrap();
        assert_eq!(header, "Bearer first");
        assert!(!format!("{header:?}").contains("first"));
        write(&path, "second-and-longer\n");
        assert_eq!(file.header(true).await.unwrap(), "Bearer second-and-longer");
        std::fs::remove_file(&path).unwrap();
        assert_eq!(file.header(true).await.unwrap(), "Bearer second-and-longer");
    }

    #[tokio::test]
    async fn a_file_that_is_no_token_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("token");
        for text in ["", " \n", "two words", "uml\u{e4}ut"] {
            write(&path, text);
            let error = TokenFile::new(path.clone())
                .header(false)
                .await
                .unwrap_err();
            assert!(error.to_string().contains("token"), "{error}");
        }
        write(&path, vec![b'a'; MAX_FILE as usize + 1]);
        assert!(TokenFile::new(path).header(false).await.is_err());
    }
}
