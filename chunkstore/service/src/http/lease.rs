//! Documents that are missing: one asker brings them, the others wait. Chunks: [`super::batch`].

use axum::body::Body;
use axum::http::{HeaderName, HeaderValue, Response};
use lazyimg_chunkstore::wire::LEASE_HEADER;
use tokio::time::Instant;

use super::call::Call;
use super::error::ApiError;
use super::{Answer, Wanted};
use crate::leases::Asked;

/// One who looks for a document, again and again while somebody is bringing it.
#[derive(Debug)]
pub(super) struct Search {
    wanted: Wanted,
    /// Until when what is missing is waited for; without it, it is just missing.
    deadline: Option<Instant>,
    /// In words.
    what: &'static str,
    /// Whether it was looked for since somebody was told to bring it.
    again: bool,
}

impl Search {
    pub fn new(wanted: Wanted, deadline: Option<Instant>, what: &'static str) -> Self {
        Self {
            wanted,
            deadline,
            what,
            again: false,
        }
    }

    /// It is not there. Waits until it should be looked for again (`None`), or gives the answer that
    /// there is instead of it.
    pub async fn missed(&mut self, call: &Call) -> Option<Answer> {
        let missing = ApiError::NotFound(self.what);
        let Some(deadline) = self.deadline else {
            return Some(Err(missing));
        };
        match call.app.leases.ask(&self.wanted, self.again) {
            Asked::Yours => {
                call.app.metrics.leases_granted.inc();
                return Some(Ok(leased(&missing, "yours")));
            }
            Asked::Look => {}
            Asked::Wait(wait) => {
                let came = tokio::select! {
                    came = wait.until(deadline) => came,
                    () = call.app.draining.cancelled() => false,
                };
                if !came {
                    return Some(Ok(leased(&missing, "coming")));
                }
            }
        }
        self.again = true;
        None
    }
}

fn leased(missing: &ApiError, whose: &'static str) -> Response<Body> {
    let mut response = missing.response();
    response.headers_mut().insert(
        HeaderName::from_static(LEASE_HEADER),
        HeaderValue::from_static(whose),
    );
    response
}
