//! Roots, garbage collection, and what is noted of them.

use lazyimg_store::audit::Audit;
use serde_json::{Value, json};

use crate::world::{ADMIN, ALPHA, Setup, World, chunk, refused};

async fn json_of(response: reqwest::Response) -> Value {
    assert_eq!(response.status(), 200);
    serde_json::from_slice(&response.bytes().await.unwrap()).unwrap()
}

#[tokio::test]
async fn roots_are_rotated_and_collected() {
    let w = World::start().await;
    let id = w.put_chunk("", &chunk(1, 1000)).await;
    let stats = json_of(w.get("", "/v1/admin/stats").await).await;
    assert_eq!(stats["roots"][0]["chunks"], 1);
    assert_eq!(stats["roots"][0]["chunk_bytes"], 1000);
    assert_eq!(stats["tenants"][0]["tenant"], "local");
    let rotated = json_of(w.post("", "/v1/admin/roots/rotate", "").await).await;
    assert_eq!(rotated, json!({"root": "r00000002"}));
    let roots = json_of(w.get("", "/v1/admin/roots").await).await;
    let states: Vec<&str> = roots
        .as_array()
        .unwrap()
        .iter()
        .map(|r| r["state"].as_str().unwrap())
        .collect();
    assert!(
        states.contains(&"active") && states.contains(&"retired"),
        "{roots}"
    );
    assert_eq!(
        w.metric("", "lazyimg_store_roots{state=\"retired\"}").await,
        1.0
    );
    let options = json!({"dry_run": true, "grace_seconds": 0}).to_string();
    let report = json_of(w.post("", "/v1/admin/gc", options).await).await;
    assert_eq!(report["dry_run"], true);
    assert_eq!(report["roots"][0]["root"], "r00000001");
    assert_eq!(
        w.get("", &format!("/v1/chunks/{id}")).await.status(),
        200,
        "nothing was done"
    );
    let report = json_of(w.post("", "/v1/admin/gc", "").await).await;
    assert_eq!(report["dry_run"], false);
    assert_eq!(
        w.metric("", "lazyimg_store_gc_passes_total{outcome=\"done\"}")
            .await,
        1.0
    );
    for body in ["x", "{\"grace\": 3}", "{\"grace_seconds\": -1}"] {
        assert_eq!(
            refused(w.post("", "/v1/admin/gc", body).await).await.0,
            400,
            "{body}"
        );
    }
    let unknown = w
        .post("", "/v1/admin/roots/r00000009/acknowledge", "")
        .await;
    assert_eq!(refused(unknown).await, (404, "not_found".into()));
    for body in ["x", "{\"ignore\": true}", "{\"ignore_alarms\": 1}"] {
        let path = "/v1/admin/roots/r00000001/acknowledge";
        assert_eq!(refused(w.post("", path, body).await).await.0, 400, "{body}");
    }
    let active = w
        .post("", "/v1/admin/roots/r00000002/acknowledge", "")
        .await;
    assert!(
        [204, 409].contains(&active.status().as_u16()),
        "{}",
        active.status()
    );
}

#[tokio::test]
async fn each_act_leaves_a_line_that_says_who_what_and_how_it_ended() {
    let mut setup = Setup::with_tenants();
    let path = setup.path("audit.log");
    setup.audit = Audit::to_file(&path).unwrap();
    let w = setup.start().await;
    let answer = w.post(ADMIN, "/v1/admin/roots/rotate", "").await;
    let request = answer.headers()["lazyimg-request-id"]
        .to_str()
        .unwrap()
        .to_owned();
    w.post(ADMIN, "/v1/admin/roots/r00000009/acknowledge", "")
        .await;
    let ignore = json!({"ignore_alarms": true}).to_string();
    let living = w.post(ADMIN, "/v1/admin/roots/r00000001/acknowledge", ignore);
    assert_eq!(refused(living.await).await, (409, "conflict".into()));
    w.post(ADMIN, "/v1/admin/gc", "").await;
    w.post(ALPHA, "/v1/admin/gc", "").await;
    w.get(ADMIN, "/v1/admin/roots").await;
    let text = std::fs::read_to_string(&path).unwrap();
    let lines: Vec<Value> = text
        .lines()
        .map(|l| serde_json::from_str(l).unwrap())
        .collect();
    let short = |l: &Value| {
        let word = |name: &str| l[name].as_str().unwrap().to_owned();
        (word("who"), word("what"), word("outcome"))
    };
    let want = [
        ("admin", "rotate-root", "done"),
        ("admin", "acknowledge", "not_found"),
        ("admin", "acknowledge", "conflict"),
        ("admin", "gc", "done"),
        ("alpha", "gc", "forbidden"),
    ];
    let want = want.map(|(a, b, c)| (a.to_owned(), b.to_owned(), c.to_owned()));
    assert_eq!(lines.iter().map(short).collect::<Vec<_>>(), want);
    assert_eq!(lines[0]["request"], request);
    assert_eq!(lines[1]["on"], "r00000009");
    assert_eq!(lines[2]["on"], "r00000001 ignore_alarms");
    assert!(!text.contains("token"), "{text}");
}
