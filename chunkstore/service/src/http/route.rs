//! The routes, by the names that they have in the log and in metrics.

/// A route. Labels are made of these only: what a client sends never becomes one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
pub enum Route {
    /// One chunk.
    Chunk,
    /// Which chunks are there.
    HasChunks,
    /// Many chunks.
    GetChunks,
    /// The live images.
    Images,
    /// The manifests of an image.
    Manifests,
    /// One manifest.
    Manifest,
    /// A start profile.
    Profile,
    /// What a tag meant.
    Reference,
    /// What the store holds.
    Stats,
    /// The roots.
    Roots,
    /// A new active root.
    Rotate,
    /// An alarm was looked into.
    Acknowledge,
    /// Garbage collection.
    Gc,
    /// Whether the process lives.
    Health,
    /// Whether it takes requests.
    Ready,
    /// What it counts.
    Metrics,
    /// No route.
    Other,
}

impl Route {
    /// All of them.
    pub const ALL: [Self; 17] = [
        Self::Chunk,
        Self::HasChunks,
        Self::GetChunks,
        Self::Images,
        Self::Manifests,
        Self::Manifest,
        Self::Profile,
        Self::Reference,
        Self::Stats,
        Self::Roots,
        Self::Rotate,
        Self::Acknowledge,
        Self::Gc,
        Self::Health,
        Self::Ready,
        Self::Metrics,
        Self::Other,
    ];

    /// Its path, as the router takes it; of [`Route::Other`], a word.
    pub fn path(self) -> &'static str {
        match self {
            Self::Chunk => "/v1/chunks/{id}",
            Self::HasChunks => "/v1/chunks/has",
            Self::GetChunks => "/v1/chunks/get",
            Self::Images => "/v1/images",
            Self::Manifests => "/v1/images/{digest}/manifests",
            Self::Manifest => "/v1/images/{digest}/manifests/{key}",
            Self::Profile => "/v1/images/{digest}/profiles/{name}",
            Self::Reference => "/v1/refs/{reference}",
            Self::Stats => "/v1/admin/stats",
            Self::Roots => "/v1/admin/roots",
            Self::Rotate => "/v1/admin/roots/rotate",
            Self::Acknowledge => "/v1/admin/roots/{root}/acknowledge",
            Self::Gc => "/v1/admin/gc",
            Self::Health => "/healthz",
            Self::Ready => "/readyz",
            Self::Metrics => "/metrics",
            Self::Other => "other",
        }
    }

    /// What it changes for all tenants, as the audit log calls it.
    pub fn act(self) -> Option<&'static str> {
        match self {
            Self::Rotate => Some("rotate-root"),
            Self::Acknowledge => Some("acknowledge"),
            Self::Gc => Some("gc"),
            _ => None,
        }
    }

    /// Whether it is asked for by those who watch the store: answered while it drains, and beyond the
    /// bound on requests.
    pub fn is_probe(self) -> bool {
        matches!(self, Self::Health | Self::Ready | Self::Metrics)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_routes_are_listed_in_their_order_with_paths_of_their_own() {
        for (index, route) in Route::ALL.into_iter().enumerate() {
            assert_eq!(route as usize, index);
            let same = Route::ALL.iter().filter(|r| r.path() == route.path());
            assert_eq!(same.count(), 1, "{route:?}");
        }
    }
}
