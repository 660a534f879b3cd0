//! TLS of the listener: the certificate from files, read again when they change.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::{Mutex, RwLock};
use tokio_rustls::rustls;
use tokio_rustls::rustls::crypto::CryptoProvider;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::{ClientHello, ResolvesServerCert, ServerConfig};
use tokio_rustls::rustls::sign::CertifiedKey;
use zeroize::Zeroizing;

use crate::watched::Watched;

/// The longest file with certificates or a key, in bytes.
const MAX_PEM: u64 = 1 << 20;

/// Why there is no TLS.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file can't be read.
    #[error("{path}: {cause}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        cause: io::Error,
    },
    /// Nothing of what is needed is in the file.
    #[error("{path} holds no {what} in PEM form")]
    Pem {
        /// The file.
        path: PathBuf,
        /// `certificate` or `private key`.
        what: &'static str,
    },
    /// Certificate and key don't work, alone or together.
    #[error(
        "certificate {cert} with key {key}: {cause}; both must be of one pair, the server's certificate first"
    )]
    Pair {
        /// File with the certificates.
        cert: PathBuf,
        /// File with the key.
        key: PathBuf,
        /// Why.
        cause: rustls::Error,
    },
}

/// A certificate with its key, as it is now.
#[derive(Debug)]
pub struct Tls {
    cert: PathBuf,
    key: PathBuf,
    provider: Arc<CryptoProvider>,
    current: Arc<Current>,
    seen: Mutex<Watched>,
}

#[derive(Debug)]
struct Current(RwLock<Arc<CertifiedKey>>);

impl ResolvesServerCert for Current {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.0.read()))
    }
}

impl Tls {
    /// From two PEM files: the certificate with those that lead to a root, and its key.
    ///
    /// # Errors
    /// [`TlsError`].
    pub fn load(cert: &Path, key: &Path) -> Result<Self, TlsError> {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let seen = watch(cert, key);
        let pair = read(cert, key, &provider)?;
        Ok(Self {
            cert: cert.to_owned(),
            key: key.to_owned(),
            provider,
            current: Arc::new(Current(RwLock::new(Arc::new(pair)))),
            seen: Mutex::new(seen),
        })
    }

    /// How TLS is spoken: versions 1.2 and 1.3, HTTP/2 before HTTP/1.1.
    ///
    /// # Errors
    /// [`TlsError::Pair`] if the cryptography lacks a version: not with the one that is built in.
    pub fn config(&self) -> Result<Arc<ServerConfig>, TlsError> {
        let builder = ServerConfig::builder_with_provider(Arc::clone(&self.provider))
            .with_safe_default_protocol_versions()
            .map_err(|cause| self.pair(cause))?;
        let resolver = Arc::clone(&self.current) as Arc<dyn ResolvesServerCert>;
        let mut config = builder.with_no_client_auth().with_cert_resolver(resolver);
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(Arc::new(config))
    }

    fn pair(&self, cause: rustls::Error) -> TlsError {
        TlsError::Pair {
            cert: self.cert.clone(),
            key: self.key.clone(),
            cause,
        }
    }

    /// Reads the files again if one has changed since; true when the certificate is new. Connections
    /// that are open keep theirs. Does file I/O.
    ///
    /// # Errors
    /// [`TlsError`]: then the certificate stays as it was. Told once for each change.
    pub fn reload_if_changed(&self) -> Result<bool, TlsError> {
        if !self.seen.lock().has_changed() {
            return Ok(false);
        }
        self.reload().map(|()| true)
    }

    /// Reads the files again. Does file I/O.
    ///
    /// # Errors
    /// [`TlsError`]: then the certificate stays as it was.
    pub fn reload(&self) -> Result<(), TlsError> {
        *self.seen.lock() = watch(&self.cert, &self.key);
        let pair = read(&self.cert, &self.key, &self.provider)?;
        *self.current.0.write() = Arc::new(pair);
        Ok(())
    }
}

fn watch(cert: &Path, key: &Path) -> Watched {
    let mut files = Watched::default();
    files.add(cert);
    files.add(key);
    files
}

fn read(cert: &Path, key: &Path, provider: &CryptoProvider) -> Result<CertifiedKey, TlsError> {
    let pem = |path: &Path, what| TlsError::Pem {
        path: path.to_owned(),
        what,
    };
    let certs = CertificateDer::pem_slice_iter(&bytes(cert)?)
        .collect::<Result<Vec<_>, _>>()
        .ok()
        .filter(|certs| !certs.is_empty())
        .ok_or_else(|| pem(cert, "certificate"))?;
    let private =
        PrivateKeyDer::from_pem_slice(&bytes(key)?).map_err(|_| pem(key, "private key"))?;
    CertifiedKey::from_der(certs, private, provider).map_err(|cause| TlsError::Pair {
        cert: cert.to_owned(),
        key: key.to_owned(),
        cause,
    })
}

fn bytes(path: &Path) -> Result<Zeroizing<Vec<u8>>, TlsError> {
    let io = |cause| TlsError::Io {
        path: path.to_owned(),
        cause,
    };
    if std::fs::metadata(path).map_err(io)?.len() > MAX_PEM {
        return Err(io(io::Error::other("larger than 1 MiB")));
    }
    std::fs::read(path).map(Zeroizing::new).map_err(io)
}
