//! The bytes of one blob, in order.

use std::io::Read;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use futures_util::{Stream, TryStreamExt};
use tokio::io::AsyncRead;
use tokio_util::io::{StreamReader, SyncIoBridge};

use super::error::SourceError;

/// A blob as a stream: the promised number of bytes, or an error as the last item.
pub struct BlobStream(Pin<Box<dyn Stream<Item = Result<Bytes, SourceError>> + Send>>);

impl BlobStream {
    pub(crate) fn new(
        stream: impl Stream<Item = Result<Bytes, SourceError>> + Send + 'static,
    ) -> Self {
        Self(Box::pin(stream))
    }

    /// As an asynchronous reader. A [`SourceError`] becomes the inner error of an `io::Error`.
    pub fn into_async_read(self) -> impl AsyncRead + Send + Unpin {
        StreamReader::new(self.0.map_err(std::io::Error::other))
    }

    /// As a blocking reader, for a thread that is **not** one of the runtime's workers
    /// (`spawn_blocking` or a thread of one's own).
    pub fn into_read(self, runtime: tokio::runtime::Handle) -> impl Read + Send {
        SyncIoBridge::new_with_handle(self.into_async_read(), runtime)
    }
}

impl Stream for BlobStream {
    type Item = Result<Bytes, SourceError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.as_mut().poll_next(cx)
    }
}
