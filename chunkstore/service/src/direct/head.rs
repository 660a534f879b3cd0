//! Heads of HTTP/1.1 messages: which requests are for a chunk and nothing else, and how answers begin.
//! RFC 9112, sections 2 to 4; the lines themselves are taken apart by `httparse`.

use std::time::SystemTime;

use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use lazyimg_convergent::{ChunkId, Digest};

/// How every request begins that is for a chunk.
const BEGIN: &[u8] = b"GET /v1/chunks/";
/// A head that is longer is left to the one who answers everything.
pub const MAX_HEAD: usize = 8 << 10;
/// As are more fields than these.
const MAX_FIELDS: usize = 32;

/// What is in a buffer.
#[derive(Debug)]
pub enum Read {
    /// The beginning of what may be a request for a chunk.
    Partial,
    /// A request for a chunk, and how many bytes its head has. It has no body.
    Chunk(Wanted, usize),
    /// Something else, or something that asks for more than a chunk.
    Other,
}

/// What a request for a chunk says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// Which chunk.
    pub id: ChunkId,
    /// All fields of the head.
    pub headers: HeaderMap,
}

impl Wanted {
    /// The path that was asked for.
    pub fn path(&self) -> String {
        format!("/v1/chunks/{}", self.id.hex())
    }
}

/// Looks at the beginning of a buffer.
pub fn read(buffer: &[u8]) -> Read {
    let known = buffer.len().min(BEGIN.len());
    if buffer[..known] != BEGIN[..known] {
        return Read::Other;
    }
    let mut fields = [httparse::EMPTY_HEADER; MAX_FIELDS];
    let mut head = httparse::Request::new(&mut fields);
    let len = match head.parse(buffer) {
        Ok(httparse::Status::Complete(len)) => len,
        Ok(httparse::Status::Partial) if buffer.len() < MAX_HEAD => return Read::Partial,
        _ => return Read::Other,
    };
    match request(&head) {
        Some(wanted) => Read::Chunk(wanted, len),
        None => Read::Other,
    }
}

fn request(head: &httparse::Request<'_, '_>) -> Option<Wanted> {
    // HTTP/1.0 ends its connections.
    if head.version != Some(1) {
        return None;
    }
    let id = chunk_id(head.path?.strip_prefix("/v1/chunks/")?)?;
    let mut headers = HeaderMap::with_capacity(head.headers.len());
    for field in head.headers.iter() {
        let name = HeaderName::from_bytes(field.name.as_bytes()).ok()?;
        let value = HeaderValue::from_bytes(field.value).ok()?;
        if asks_for_more(&name, &value) {
            return None;
        }
        headers.append(name, value);
    }
    Some(Wanted { id, headers })
}

/// 64 hex digits in small letters.
fn chunk_id(hex: &str) -> Option<ChunkId> {
    let digest: Digest = format!("sha256:{hex}").parse().ok()?;
    Some(ChunkId(digest.0))
}

/// Whether a field means that there is a body, or another protocol, or an end of the connection.
fn asks_for_more(name: &HeaderName, value: &HeaderValue) -> bool {
    match *name {
        header::CONNECTION => !value.as_bytes().eq_ignore_ascii_case(b"keep-alive"),
        header::CONTENT_LENGTH | header::TRANSFER_ENCODING | header::UPGRADE | header::EXPECT => {
            true
        }
        _ => false,
    }
}

/// The head of an answer of `len` bytes.
pub fn answer(status: StatusCode, headers: &HeaderMap, len: u64, last: bool) -> Vec<u8> {
    let mut head = Vec::with_capacity(512);
    let mut put = |parts: &[&[u8]]| parts.iter().for_each(|part| head.extend_from_slice(part));
    let reason = status.canonical_reason().unwrap_or_default();
    put(&[
        b"HTTP/1.1 ",
        status.as_str().as_bytes(),
        b" ",
        reason.as_bytes(),
        b"\r\n",
    ]);
    for (name, value) in headers {
        if *name != header::CONTENT_LENGTH {
            put(&[name.as_str().as_bytes(), b": ", value.as_bytes(), b"\r\n"]);
        }
    }
    // A 304 has no body, and a length would be that of the chunk.
    if status != StatusCode::NOT_MODIFIED {
        put(&[b"content-length: ", len.to_string().as_bytes(), b"\r\n"]);
    }
    if last {
        put(&[b"connection: close\r\n"]);
    }
    let date = httpdate::fmt_http_date(SystemTime::now());
    put(&[b"date: ", date.as_bytes(), b"\r\n\r\n"]);
    head
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";

    fn get(more: &str) -> String {
        format!("GET /v1/chunks/{ID} HTTP/1.1\r\nhost: a\r\n{more}\r\n")
    }

    #[test]
    fn a_request_for_a_chunk_is_taken_with_its_fields_and_what_follows_is_left() {
        let text = get("authorization: Bearer x\r\nconnection: Keep-Alive\r\n");
        let both = format!("{text}{text}");
        let Read::Chunk(wanted, len) = read(both.as_bytes()) else {
            panic!("{both}")
        };
        assert_eq!((wanted.id.hex(), len), (ID.to_owned(), text.len()));
        assert_eq!(wanted.headers["authorization"], "Bearer x");
        assert_eq!(wanted.path(), format!("/v1/chunks/{ID}"));
        for end in 0..text.len() {
            assert!(
                matches!(read(&text.as_bytes()[..end]), Read::Partial),
                "{end}"
            );
        }
    }

    #[test]
    fn whatever_asks_for_more_than_a_chunk_is_left_to_the_other_one() {
        for other in [
            get("content-length: 0\r\n"),
            get("transfer-encoding: chunked\r\n"),
            get("connection: close\r\n"),
            get("connection: keep-alive, upgrade\r\n"),
            get("expect: 100-continue\r\n"),
            get("upgrade: h2c\r\n"),
            get(&"a: b\r\n".repeat(MAX_FIELDS)),
            get("a b: c\r\n"),
            get("").replace("HTTP/1.1", "HTTP/1.0"),
            get("").replace("GET", "PUT"),
            get("").replace("00112233", "0011223"),
            get("").replace("ccdd", "CCDD"),
            get("").replace(ID, &format!("{ID}?x=1")),
            get("").replace(ID, "has"),
            "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_owned(),
            "\r\n".to_owned(),
            "GET /v2".to_owned(),
            format!("GET /v1/chunks/{}", "a".repeat(MAX_HEAD)),
        ] {
            assert!(matches!(read(other.as_bytes()), Read::Other), "{other}");
        }
    }

    #[test]
    fn an_answer_says_its_length_once_and_whether_it_is_the_last() {
        let mut headers = HeaderMap::new();
        headers.insert("etag", HeaderValue::from_static("\"x\""));
        headers.insert(header::CONTENT_LENGTH, HeaderValue::from_static("0"));
        let text = String::from_utf8(answer(StatusCode::OK, &headers, 12, true)).unwrap();
        let (begin, date) = text.split_once("date: ").unwrap();
        assert_eq!(
            begin,
            "HTTP/1.1 200 OK\r\netag: \"x\"\r\ncontent-length: 12\r\nconnection: close\r\n"
        );
        assert!(date.ends_with(" GMT\r\n\r\n"), "{date}");
        let text = answer(StatusCode::NOT_MODIFIED, &HeaderMap::new(), 0, false);
        let text = String::from_utf8(text).unwrap();
        assert!(
            !text.contains("length") && !text.contains("close"),
            "{text}"
        );
    }
}
