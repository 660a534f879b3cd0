//! What the store counts, in Prometheus' text form. Labels have few values, none of them from outside.

use std::time::Duration;

use prometheus::{
    Encoder as _, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge,
    IntGaugeVec, Opts, Registry, TextEncoder,
};

use crate::catalog::{GcReport, RootInfo, RootState};
use crate::http::Route;

/// Upper ends of the buckets of latencies, in seconds.
const BUCKETS: [f64; 16] = [
    0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5,
    5.0, 10.0,
];

/// Classes of status; `gone` is a client that went away before it was answered in full.
const CLASSES: [&str; 5] = ["2xx", "3xx", "4xx", "5xx", "gone"];

/// Media type of [`Metrics::text`].
pub const TEXT_TYPE: &str = "text/plain; version=0.0.4";

/// The counters of one store.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    /// One for each of [`Route::ALL`]: nothing is looked up by label while a request is served.
    routes: Vec<OfRoute>,
    /// Chunks that were asked for and found.
    pub chunk_hits: IntCounter,
    /// Of those, how many the kernel sent from their files.
    pub chunks_from_files: IntCounter,
    /// Chunks that were asked for and not found.
    pub chunk_misses: IntCounter,
    /// Chunks that somebody was told to bring.
    pub leases_granted: IntCounter,
    /// Requests under way.
    pub under_way: IntGauge,
    /// Open connections.
    pub connections: IntGauge,
    /// Connections that were closed because nothing moved.
    pub stalled: IntCounter,
    /// TLS handshakes that failed.
    pub handshakes_failed: IntCounter,
    /// Tenants or certificates that could not be read again.
    pub reloads_failed: IntCounter,
    engine_errors: IntCounterVec,
    memory: IntGauge,
    leases: IntGauge,
    tenants: IntGauge,
    engine_bytes: IntGauge,
    roots: IntGaugeVec,
    alarms: IntGauge,
    hot: IntGaugeVec,
    gc: GcCounters,
}

#[derive(Debug)]
struct OfRoute {
    requests: [IntCounter; CLASSES.len()],
    seconds: Histogram,
    bytes_in: IntCounter,
    bytes_out: IntCounter,
}

#[derive(Debug)]
struct GcCounters {
    passes: IntCounterVec,
    seconds: IntGauge,
    roots_deleted: IntCounter,
    manifests_moved: IntCounter,
    manifests_dropped: IntCounter,
    chunks_copied: IntCounter,
    bytes_copied: IntCounter,
    stuck: IntGauge,
}

/// What is only looked at when somebody asks.
#[derive(Debug, Default)]
pub struct Observed {
    /// Bytes of bodies in memory.
    pub memory: u64,
    /// Leases that are held.
    pub leases: usize,
    /// Tenants that are known.
    pub tenants: usize,
    /// Bytes that the engine uses.
    pub engine_bytes: Option<u64>,
    /// The roots; `None` when the engine did not tell.
    pub roots: Option<Vec<RootInfo>>,
    /// What the engine's hot tier was asked, by outcome, where it has one.
    pub hot: Option<[(&'static str, u64); 6]>,
}

/// Makes metrics of one registry.
struct Maker<'a>(&'a Registry);

impl Maker<'_> {
    fn add<M: prometheus::core::Collector + Clone + 'static>(
        &self,
        made: prometheus::Result<M>,
    ) -> prometheus::Result<M> {
        let made = made?;
        self.0.register(Box::new(made.clone()))?;
        Ok(made)
    }

    fn counter(&self, name: &str, help: &str) -> prometheus::Result<IntCounter> {
        self.add(IntCounter::new(name, help))
    }

    fn gauge(&self, name: &str, help: &str) -> prometheus::Result<IntGauge> {
        self.add(IntGauge::new(name, help))
    }

    fn counters(&self, name: &str, help: &str, by: &[&str]) -> prometheus::Result<IntCounterVec> {
        self.add(IntCounterVec::new(Opts::new(name, help), by))
    }
}

impl Metrics {
    /// All at zero, in a registry of their own.
    ///
    /// # Errors
    /// None but for a mistake in a metric's name.
    pub fn new() -> prometheus::Result<Self> {
        let registry = Registry::new();
        let m = Maker(&registry);
        let roots = Opts::new("lazyimg_store_roots", "Roots by state.");
        let hot = Opts::new(
            "lazyimg_store_hot_tier",
            "What the engine's hot tier was asked since the start, by outcome.",
        );
        Ok(Self {
            routes: routes(&m)?,
            chunk_hits: m.counter(
                "lazyimg_store_chunk_hits_total",
                "Chunks that were asked for and found.",
            )?,
            chunks_from_files: m.counter(
                "lazyimg_store_chunks_from_files_total",
                "Chunks that were found and sent by the kernel from their files, without a copy.",
            )?,
            chunk_misses: m.counter(
                "lazyimg_store_chunk_misses_total",
                "Chunks that were asked for and not found.",
            )?,
            leases_granted: m.counter(
                "lazyimg_store_leases_granted_total",
                "Chunks and references that somebody was told to bring.",
            )?,
            under_way: m.gauge("lazyimg_store_requests_under_way", "Requests under way.")?,
            connections: m.gauge("lazyimg_store_connections", "Open connections.")?,
            stalled: m.counter(
                "lazyimg_store_connections_stalled_total",
                "Connections that were closed because nothing moved.",
            )?,
            handshakes_failed: m.counter(
                "lazyimg_store_tls_handshakes_failed_total",
                "TLS handshakes that failed.",
            )?,
            reloads_failed: m.counter(
                "lazyimg_store_reloads_failed_total",
                "Changed tenants or certificates that could not be used; the ones before stay.",
            )?,
            engine_errors: m.counters(
                "lazyimg_store_engine_errors_total",
                "What the engine did not do, by kind.",
                &["kind"],
            )?,
            memory: m.gauge(
                "lazyimg_store_body_memory_bytes",
                "Bytes of bodies in memory.",
            )?,
            leases: m.gauge("lazyimg_store_leases", "Leases that are held.")?,
            tenants: m.gauge("lazyimg_store_tenants", "Tenants that are known.")?,
            engine_bytes: m.gauge(
                "lazyimg_store_engine_used_bytes",
                "Bytes that the engine uses, where it can tell.",
            )?,
            roots: m.add(IntGaugeVec::new(roots, &["state"]))?,
            alarms: m.gauge(
                "lazyimg_store_alarms",
                "Roots whose deletion an alarm stops: `lazyimg store roots`.",
            )?,
            hot: m.add(IntGaugeVec::new(hot, &["outcome"]))?,
            gc: GcCounters::new(&m)?,
            registry,
        })
    }

    /// Counts a request that has ended. `status` is `None` for a client that went away before.
    pub fn request(&self, route: Route, status: Option<u16>, took: Duration) {
        let class = match status {
            Some(..300) => 0,
            Some(300..400) => 1,
            Some(400..500) => 2,
            Some(_) => 3,
            None => 4,
        };
        let of = &self.routes[route as usize];
        of.requests[class].inc();
        of.seconds.observe(took.as_secs_f64());
    }

    /// Counts bytes of bodies that came.
    pub fn bytes_in(&self, route: Route, bytes: u64) {
        self.routes[route as usize].bytes_in.inc_by(bytes);
    }

    /// Counts bytes of bodies that went.
    pub fn bytes_out(&self, route: Route, bytes: u64) {
        self.routes[route as usize].bytes_out.inc_by(bytes);
    }

    /// Counts what the engine did not do.
    pub fn engine_error(&self, kind: &'static str) {
        self.engine_errors.with_label_values(&[kind]).inc();
    }

    /// Counts a pass of garbage collection that changed something or failed.
    pub fn gc(&self, result: Option<&GcReport>, took: Duration) {
        let gc = &self.gc;
        let clean = |report: &GcReport| report.roots.iter().all(|root| root.error.is_none());
        let outcome = match result.is_some_and(clean) {
            true => "done",
            false => "failed",
        };
        gc.passes.with_label_values(&[outcome]).inc();
        gc.seconds.set(took.as_secs() as i64);
        let Some(report) = result else { return };
        let mut stuck = 0;
        for root in &report.roots {
            gc.roots_deleted.inc_by(u64::from(root.after.is_none()));
            gc.manifests_moved.inc_by(root.manifests_moved);
            gc.manifests_dropped.inc_by(root.manifests_dropped);
            gc.chunks_copied.inc_by(root.chunks_copied);
            gc.bytes_copied.inc_by(root.bytes_copied);
            stuck += root.stuck.len();
        }
        gc.stuck.set(stuck as i64);
    }

    /// Everything as text.
    ///
    /// # Errors
    /// None but for a mistake in the metrics.
    pub fn text(&self, now: &Observed) -> prometheus::Result<Vec<u8>> {
        self.memory.set(now.memory as i64);
        self.leases.set(now.leases as i64);
        self.tenants.set(now.tenants as i64);
        if let Some(bytes) = now.engine_bytes {
            self.engine_bytes.set(bytes as i64);
        }
        for (outcome, count) in now.hot.into_iter().flatten() {
            self.hot.with_label_values(&[outcome]).set(count as i64);
        }
        if let Some(roots) = &now.roots {
            for state in [
                RootState::Active,
                RootState::Retired,
                RootState::Expired,
                RootState::Deleting,
            ] {
                let count = roots.iter().filter(|r| r.state == state).count();
                let gauge = self.roots.with_label_values(&[state.to_string().as_str()]);
                gauge.set(count as i64);
            }
            let alarms = roots.iter().filter(|r| r.alarm.is_some()).count();
            self.alarms.set(alarms as i64);
        }
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut text)?;
        Ok(text)
    }
}

impl GcCounters {
    fn new(m: &Maker<'_>) -> prometheus::Result<Self> {
        Ok(Self {
            passes: m.counters(
                "lazyimg_store_gc_passes_total",
                "Passes of garbage collection, by outcome.",
                &["outcome"],
            )?,
            seconds: m.gauge(
                "lazyimg_store_gc_last_pass_seconds",
                "How long the last pass took.",
            )?,
            roots_deleted: m.counter(
                "lazyimg_store_gc_roots_deleted_total",
                "Roots that were deleted.",
            )?,
            manifests_moved: m.counter(
                "lazyimg_store_gc_manifests_moved_total",
                "Manifests that were moved to the active root.",
            )?,
            manifests_dropped: m.counter(
                "lazyimg_store_gc_manifests_dropped_total",
                "Manifests that nobody had asked for in long.",
            )?,
            chunks_copied: m.counter(
                "lazyimg_store_gc_chunks_copied_total",
                "Chunks that were copied to the active root.",
            )?,
            bytes_copied: m.counter(
                "lazyimg_store_gc_copied_bytes_total",
                "Bytes in these chunks.",
            )?,
            stuck: m.gauge(
                "lazyimg_store_gc_stuck_manifests",
                "Manifests that the last pass could not move: chunks of theirs are gone or damaged.",
            )?,
        })
    }
}

fn routes(m: &Maker<'_>) -> prometheus::Result<Vec<OfRoute>> {
    let requests = m.counters(
        "lazyimg_store_requests_total",
        "Requests that have ended, by class of status.",
        &["route", "status"],
    )?;
    let seconds = HistogramOpts::new(
        "lazyimg_store_request_seconds",
        "From the request's head to the end of the answer.",
    );
    let seconds = m.add(HistogramVec::new(
        seconds.buckets(BUCKETS.to_vec()),
        &["route"],
    ))?;
    let bytes_in = m.counters(
        "lazyimg_store_received_bytes_total",
        "Bytes of bodies that came.",
        &["route"],
    )?;
    let bytes_out = m.counters(
        "lazyimg_store_sent_bytes_total",
        "Bytes of bodies that went.",
        &["route"],
    )?;
    let of = |route: Route| OfRoute {
        requests: CLASSES.map(|class| requests.with_label_values(&[route.path(), class])),
        seconds: seconds.with_label_values(&[route.path()]),
        bytes_in: bytes_in.with_label_values(&[route.path()]),
        bytes_out: bytes_out.with_label_values(&[route.path()]),
    };
    Ok(Route::ALL.into_iter().map(of).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_dashboard_shows_only_what_is_counted() {
        let dashboard = include_str!("../../../docs/operations/grafana-store.json");
        let counted = include_str!("metrics.rs");
        let named = |c: char| c.is_ascii_lowercase() || c == '_';
        let mut shown = 0;
        for (at, _) in dashboard.match_indices("lazyimg_store_") {
            let name = dashboard[at..].split(|c| !named(c)).next().unwrap();
            let name = name.strip_suffix("_bucket").unwrap_or(name);
            assert!(counted.contains(&format!("\"{name}\"")), "{name}");
            shown += 1;
        }
        assert!(shown > 20, "{shown}");
    }

    #[test]
    fn requests_are_counted_by_route_and_class() {
        let metrics = Metrics::new().unwrap();
        metrics.request(Route::Chunk, Some(200), Duration::from_micros(200));
        metrics.request(Route::Chunk, Some(404), Duration::from_millis(3));
        metrics.request(Route::Chunk, None, Duration::from_secs(60));
        metrics.bytes_out(Route::Chunk, 512);
        metrics.engine_error("full");
        let text = String::from_utf8(metrics.text(&Observed::default()).unwrap()).unwrap();
        for line in [
            r#"lazyimg_store_requests_total{route="/v1/chunks/{id}",status="2xx"} 1"#,
            r#"lazyimg_store_requests_total{route="/v1/chunks/{id}",status="4xx"} 1"#,
            r#"lazyimg_store_requests_total{route="/v1/chunks/{id}",status="gone"} 1"#,
            r#"lazyimg_store_request_seconds_bucket{route="/v1/chunks/{id}",le="0.00025"} 1"#,
            r#"lazyimg_store_request_seconds_bucket{route="/v1/chunks/{id}",le="10"} 2"#,
            r#"lazyimg_store_sent_bytes_total{route="/v1/chunks/{id}"} 512"#,
            r#"lazyimg_store_engine_errors_total{kind="full"} 1"#,
        ] {
            assert!(text.contains(line), "{line} is not in {text}");
        }
    }
}
