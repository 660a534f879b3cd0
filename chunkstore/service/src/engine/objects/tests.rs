//! What services that fail do to the engine, with one in this process that speaks enough of S3.

use std::collections::HashMap;
use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, Method, Response, StatusCode, Uri, header};
use parking_lot::Mutex;

use super::*;

/// Objects by path; and how many conditional writes do their work and then fail.
#[derive(Default)]
struct Service {
    objects: Mutex<HashMap<String, Bytes>>,
    failing: Mutex<usize>,
}

async fn serve(
    State(service): State<Arc<Service>>,
    method: Method,
    uri: Uri,
    headers: HeaderMap,
    body: Bytes,
) -> Response<Body> {
    let answer = |status: StatusCode, bytes: Bytes| {
        let response = Response::builder().status(status);
        let response = response.header(header::ETAG, "\"tag\"");
        response.body(Body::from(bytes)).unwrap()
    };
    let mut objects = service.objects.lock();
    let key = uri.path().to_owned();
    match (method, objects.get(&key).cloned()) {
        (Method::PUT, found) => {
            let conditional = headers.contains_key(header::IF_NONE_MATCH);
            if conditional && found.is_some() {
                return answer(StatusCode::PRECONDITION_FAILED, Bytes::new());
            }
            objects.insert(key, body);
            let mut failing = service.failing.lock();
            if conditional && *failing > 0 {
                *failing -= 1;
                return answer(StatusCode::INTERNAL_SERVER_ERROR, Bytes::new());
            }
            answer(StatusCode::OK, Bytes::new())
        }
        (Method::DELETE, _) => {
            objects.remove(&key);
            answer(StatusCode::NO_CONTENT, Bytes::new())
        }
        (_, Some(bytes)) => answer(StatusCode::OK, bytes),
        (_, None) => answer(StatusCode::NOT_FOUND, Bytes::new()),
    }
}

async fn engine() -> (Arc<Service>, ObjectsEngine) {
    let service = Arc::new(Service::default());
    let router = Router::new().fallback(serve).with_state(service.clone());
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move { axum::serve(listener, router).await });
    let builder = opendal::services::S3::default()
        .endpoint(&endpoint)
        .bucket("bucket")
        .region("region")
        .access_key_id("id")
        .secret_access_key("secret")
        .disable_config_load();
    opendal::install_default();
    let op = Operator::new(builder).unwrap();
    let engine = ObjectsEngine::open(op, "s3").await.unwrap();
    assert!(engine.conditional);
    (service, engine)
}

#[tokio::test]
async fn a_conditional_write_that_failed_after_it_was_done_is_known_as_ones_own() {
    let (service, engine) = engine().await;
    let put = |bytes: &'static [u8]| engine.put_doc("a", Bytes::from_static(bytes), When::Absent);
    *service.failing.lock() = 1;
    assert!(put(b"first").await.unwrap(), "it was not there before");
    assert_eq!(*service.failing.lock(), 0);
    assert!(!put(b"first").await.unwrap(), "now it is, with the same");
    assert!(!put(b"second").await.unwrap());
    assert_eq!(
        engine.get_doc("a").await.unwrap(),
        Some(Bytes::from_static(b"first"))
    );
}

#[tokio::test]
async fn a_service_without_room_is_full_and_a_tenant_called_so_is_not() {
    let (_service, engine) = engine().await;
    let error = |message: &str| {
        let error = opendal::Error::new(ErrorKind::Unexpected, message);
        engine.error("write", "docs/held/r00000001/grants/quota/00", &error)
    };
    for full in [
        "S3Error { code: \"QuotaExceeded\", message: \"\" }",
        "XMinioStorageFull",
        "507 Insufficient Storage",
    ] {
        assert!(matches!(error(full), EngineError::Full(_)), "{full}");
    }
    for not in [
        "S3Error { code: \"SlowDown\", resource: \"/b/docs/held/r00000001/grants/quota/00\" }",
        "docs/held/r00000001/grants/quotaexceeded/00",
        "docs/held/r00000001/grants/insufficientstorage/00",
    ] {
        assert!(matches!(error(not), EngineError::Unavailable(_)), "{not}");
    }
}
