//! A real registry: docker-registry on loopback, or in a network namespace.

use std::fs;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::error::{BenchError, at, io};
use crate::process;
use crate::setup::oci::TAG;

/// How long it may take to listen.
const START_WITHIN: Duration = Duration::from_secs(20);

/// A running registry; ends when dropped.
pub struct Registry {
    child: Child,
    /// Where it listens.
    pub address: SocketAddr,
}

impl Registry {
    /// On a free loopback port, with its blobs below `dir`.
    pub fn on_loopback(dir: &Path) -> Result<Self, BenchError> {
        let probe = TcpListener::bind("127.0.0.1:0").map_err(io("a free loopback port"))?;
        let address = probe.local_addr().map_err(io("a free loopback port"))?;
        drop(probe);
        Self::start(dir, address)
    }

    /// On `address`, in the network namespace of the calling thread.
    pub fn start(dir: &Path, address: SocketAddr) -> Result<Self, BenchError> {
        fs::create_dir_all(dir).map_err(at(dir))?;
        let config = dir.join("config.yml");
        let text = format!(
            "version: 0.1\nlog: {{level: error, accesslog: {{disabled: true}}}}\n\
             storage:\n  filesystem: {{rootdirectory: {}}}\n  delete: {{enabled: true}}\n\
             http: {{addr: \"{address}\"}}\n",
            dir.join("blobs").display()
        );
        fs::write(&config, text).map_err(at(&config))?;
        let log = dir.join("log");
        let log = fs::File::create(&log).map_err(at(&log))?;
        let child = Command::new("docker-registry")
            .arg("serve")
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .map_err(io("starting docker-registry"))?;
        let registry = Self { child, address };
        let deadline = Instant::now() + START_WITHIN;
        while TcpStream::connect_timeout(&address, Duration::from_secs(1)).is_err() {
            if Instant::now() > deadline {
                let log = dir.join("log");
                return Err(BenchError::Setup(format!(
                    "docker-registry does not listen on {address}; see {}",
                    log.display()
                )));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(registry)
    }

    /// How an image in it is named.
    pub fn reference(&self, name: &str) -> String {
        format!("{}/{name}:{TAG}", self.address)
    }

    /// Pushes a layout as `name`, with skopeo.
    pub fn push(&self, layout: &Path, name: &str) -> Result<(), BenchError> {
        process::run(
            Command::new("skopeo")
                .args(["copy", "--quiet", "--dest-tls-verify=false"])
                .arg(format!("oci:{}:{TAG}", layout.display()))
                .arg(format!("docker://{}", self.reference(name))),
        )
        .map(drop)
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        // It holds nothing that must be written: everything was answered before.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
