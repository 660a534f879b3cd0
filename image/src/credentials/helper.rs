//! Credential helpers: `docker-credential-NAME get`, the registry on standard input, JSON out.
//! Protocol: <https://github.com/docker/docker-credential-helpers>.

use std::ffi::OsString;
use std::process::Stdio;
use std::time::Duration;

use serde::Deserialize;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::Command;
use zeroize::Zeroizing;

use super::{Credentials, CredentialsError, HELPER_VARIABLES, MAX_HELPER_OUTPUT};

/// How much of a helper's standard error a message quotes, in bytes.
const QUOTED_STDERR: u64 = 400;

/// The user name that marks a secret as an identity token.
const TOKEN_USER: &str = "<token>";

/// What a helper prints. No `Debug`: it holds a secret.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Answer {
    #[serde(default)]
    username: String,
    secret: Zeroizing<String>,
}

/// Asks a helper for a registry; `None` when it knows none. `env`: see
/// [`super::CredentialPlaces::helper_env`].
pub(super) async fn get(
    helper: &str,
    registry: &str,
    env: Option<&[(String, OsString)]>,
    timeout: Duration,
) -> Result<Option<Credentials>, CredentialsError> {
    let failed = |reason: String| CredentialsError::Helper {
        helper: format!(
            "docker-credential-{}",
            helper.chars().take(80).collect::<String>()
        ),
        registry: registry.to_owned(),
        reason,
    };
    // The name comes from a file that other tools write; it must stay a name on the PATH.
    if helper.len() > 80
        || !helper
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
    {
        return Err(failed(
            "its name has characters that a program's name does not have".into(),
        ));
    }
    match tokio::time::timeout(timeout, run(helper, registry, env)).await {
        Ok(result) => result.map_err(failed),
        Err(_) => Err(failed(format!(
            "it took longer than {} s",
            timeout.as_secs()
        ))),
    }
}

async fn run(
    helper: &str,
    registry: &str,
    env: Option<&[(String, OsString)]>,
) -> Result<Option<Credentials>, String> {
    let program = format!("docker-credential-{helper}");
    let mut command = Command::new(&program);
    if let Some(env) = env {
        // The program is looked for on the PATH that it gets.
        for name in HELPER_VARIABLES {
            match env.iter().find(|(n, _)| n == name) {
                Some((_, value)) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
    }
    let mut child = command
        .arg("get")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|e| format!("it could not be started: {e}"))?;
    let (Some(mut stdin), Some(stdout), Some(stderr)) =
        (child.stdin.take(), child.stdout.take(), child.stderr.take())
    else {
        return Err("its pipes are missing".into());
    };
    let write = async {
        // A helper that does not read its input may still answer: a broken pipe is no failure.
        let _ = stdin.write_all(format!("{registry}\n").as_bytes()).await;
        drop(stdin);
    };
    let read = async {
        // Room for everything at once: a growing buffer would leave copies behind.
        let mut out = Zeroizing::new(Vec::with_capacity(MAX_HELPER_OUTPUT + 1));
        stdout
            .take(MAX_HELPER_OUTPUT as u64 + 1)
            .read_to_end(&mut out)
            .await
            .map(|_| out)
    };
    let complain = async {
        let mut text = Vec::new();
        let mut stderr = stderr.take(QUOTED_STDERR);
        let _ = stderr.read_to_end(&mut text).await;
        // The rest is read and dropped, so that a talkative helper does not block.
        let _ = tokio::io::copy(&mut stderr.into_inner(), &mut tokio::io::sink()).await;
        text
    };
    let ((), out, complaint) = tokio::join!(write, read, complain);
    let out = out.map_err(|e| format!("its output could not be read: {e}"))?;
    if out.len() > MAX_HELPER_OUTPUT {
        return Err(format!("it printed more than {MAX_HELPER_OUTPUT} bytes"));
    }
    let status = child
        .wait()
        .await
        .map_err(|e| format!("its exit could not be awaited: {e}"))?;
    if !status.success() {
        return if knows_nothing(&out) {
            Ok(None)
        } else {
            Err(failure(status, &complaint))
        };
    }
    let answer: Answer = serde_json::from_slice(&out).map_err(|e| {
        format!(
            "it printed something that is not its protocol (line {} column {})",
            e.line(),
            e.column()
        )
    })?;
    if answer.secret.is_empty() {
        return Ok(None);
    }
    Ok(Some(match answer.username.as_str() {
        TOKEN_USER => Credentials::IdentityToken(answer.secret),
        _ => Credentials::Password {
            username: answer.username,
            password: answer.secret,
        },
    }))
}

/// Helpers say on standard output, in these words, that they have no entry.
fn knows_nothing(out: &[u8]) -> bool {
    let text = String::from_utf8_lossy(&out[..out.len().min(200)]).to_ascii_lowercase();
    text.contains("credentials not found")
        || text.contains("no credentials")
        || text.contains("not found in native keychain")
}

fn failure(status: std::process::ExitStatus, complaint: &[u8]) -> String {
    let said: String = String::from_utf8_lossy(complaint)
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    match said.trim() {
        "" => format!("it ended with {status}"),
        said => format!("it ended with {status}: {said}"),
    }
}
