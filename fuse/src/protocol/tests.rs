//! Every message survives its line, and strangers' words are bounded.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use super::*;

fn mount_request() -> MountRequest {
    MountRequest {
        image: "127.0.0.1:5000/x:v1".into(),
        dir: WirePath(PathBuf::from(OsString::from_vec(b"/mnt/\xff".to_vec()))),
        namespace: "mnt:[1]".into(),
        key: KeySource::File(WirePath("/k".into())),
        source: SourceSettings {
            credentials: Some(CredentialSettings {
                files: vec![WirePath("/run/user/0/containers/auth.json".into())],
                helper_env: BTreeMap::from([("PATH".into(), WirePath("/a:/b".into()))]),
            }),
            ..SourceSettings::default()
        },
        cache: CacheSettings {
            cache_bytes: Some(1),
            hot_bytes: None,
        },
        flags: MountFlags::default(),
        tree: TreeSettings::default(),
    }
}

#[test]
fn every_message_survives_its_line() {
    let requests = [
        Request::Ping,
        Request::Mount(Box::new(mount_request())),
        Request::Umount {
            dir: WirePath("/a".into()),
            how: Unmount::Lazy,
            namespace: "n".into(),
        },
        Request::Status,
        Request::Verify {
            dir: WirePath("/a".into()),
            tiers: true,
        },
        Request::Stop,
    ];
    for request in requests {
        let line = serde_json::to_string(&Envelope::new(request.clone())).unwrap();
        assert!(!line.contains('\n'));
        assert_eq!(
            serde_json::from_str::<Envelope<Request>>(&line)
                .unwrap()
                .message,
            request,
            "{line}"
        );
    }
    let replies = [
        Reply::Working { done: 1, total: 0 },
        Reply::Mounted {
            digest: Digest::of(b"x"),
            dir: WirePath("/a".into()),
            note: None,
        },
        Reply::Verified(VerifyReport::default()),
        Reply::Error {
            code: ErrorCode::NotMounted,
            message: "a\nb".into(),
        },
    ];
    for reply in replies {
        let line = serde_json::to_string(&Envelope::new(reply.clone())).unwrap();
        assert!(!line.contains('\n'));
        assert_eq!(
            serde_json::from_str::<Envelope<Reply>>(&line)
                .unwrap()
                .message,
            reply,
            "{line}"
        );
    }
}

#[test]
fn a_request_may_leave_out_what_has_a_default_and_may_say_more() {
    let line = r#"{"v":1,"op":"mount","image":"x","dir":"/m","namespace":"n","key":{"command":"k"},"news":1}"#;
    let Request::Mount(request) = serde_json::from_str::<Envelope<Request>>(line)
        .unwrap()
        .message
    else {
        panic!("not a mount");
    };
    assert_eq!(request.tree, TreeSettings::default());
    assert_eq!(request.key, KeySource::Command("k".into()));
    assert_eq!(request.source.credentials, None);
    assert_eq!(request.cache, CacheSettings::default());
    let old = r#"{"v":1,"reply":"verified","good":1,"healed":0,"cached":1,"bad":0,"failures":[]}"#;
    let reply = serde_json::from_str::<Envelope<Reply>>(old)
        .unwrap()
        .message;
    assert!(matches!(reply, Reply::Verified(report) if report.unreachable == 0));
}

#[test]
fn credentials_arrive_as_they_were_sent_but_for_variables_that_helpers_do_not_need() {
    let places = CredentialPlaces {
        files: vec!["/a".into(), "/b".into()],
        helper_env: Some(vec![
            ("HOME".into(), "/h".into()),
            ("PATH".into(), "/p".into()),
        ]),
    };
    let mut settings = CredentialSettings::from(places.clone());
    let preload = WirePath("/evil.so".into());
    settings.helper_env.insert("LD_PRELOAD".into(), preload);
    assert_eq!(CredentialPlaces::from(settings), places);
}

#[test]
fn a_read_timeout_from_a_stranger_is_bounded() {
    let mut settings = TreeSettings::default();
    for (asked, given) in [(0, Duration::from_millis(1)), (u64::MAX, MAX_READ_TIMEOUT)] {
        settings.read_timeout_ms = asked;
        assert_eq!(TreeOptions::from(&settings).read_timeout, given);
    }
}

#[test]
fn paths_that_are_no_paths_are_refused() {
    for path in [
        r#"{"hex":"abc"}"#,
        r#"{"hex":"zz"}"#,
        r#"{"hex":"+1"}"#,
        "\"a\\u0000b\"",
        r#"{"hex":"é"}"#,
    ] {
        assert!(serde_json::from_str::<WirePath>(path).is_err(), "{path}");
    }
}
