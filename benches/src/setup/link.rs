//! A slow link: two network namespaces joined by TUN devices whose packets are held and paced.
//!
//! The kernel may lack netem, so the delay is made here. Packets carry vnet headers, so that large
//! segments pass whole and TCP behaves as on a real network card with offloads.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::num::NonZeroU64;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::error::{BenchError, io};
use crate::process;

/// Address of the near end (the host that mounts).
pub const NEAR: Ipv4Addr = Ipv4Addr::new(10, 99, 1, 1);

/// Address of the far end (the registry).
pub const FAR: Ipv4Addr = Ipv4Addr::new(10, 99, 1, 2);

/// How much is held before packets are dropped, in time at the link's rate: a router's buffer.
const BUFFER: Duration = Duration::from_millis(30);

/// Length of the vnet header before each packet, in bytes.
const VNET_HEADER: usize = 10;

/// Payload of one packet on the wire, and what Ethernet, IP and TCP add to it, in bytes.
const SEGMENT: usize = 1448;
const SEGMENT_OVERHEAD: usize = 66;

/// Longest packet with offloads, in bytes.
const PACKET_MAX: usize = 70_000;

/// Two namespaces and the link between them; all of it ends when dropped.
pub struct Link {
    near: Namespace,
    far: Namespace,
    stop: Arc<AtomicBool>,
    pumps: Vec<JoinHandle<()>>,
    to_near: Arc<AtomicU64>,
}

impl Link {
    /// A link with this round-trip time and this rate each way.
    pub fn new(round_trip: Duration, bits_per_s: f64) -> Result<Self, BenchError> {
        let id = std::process::id();
        let near = Namespace::new(format!("lazyimg-near-{id}"))?;
        let far = Namespace::new(format!("lazyimg-far-{id}"))?;
        let a = near.run(|| tun("near0"))??;
        let b = far.run(|| tun("far0"))??;
        near.up("near0", NEAR)?;
        far.up("far0", FAR)?;
        let (stop, to_near) = (
            Arc::new(AtomicBool::new(false)),
            Arc::new(AtomicU64::new(0)),
        );
        let dup = |f: &File| f.try_clone().map_err(io("duplicating a TUN descriptor"));
        let mut pumps = Vec::new();
        for (from, to, bytes) in [
            (dup(&a)?, dup(&b)?, Arc::default()),
            (dup(&b)?, dup(&a)?, to_near.clone()),
        ] {
            let pump = Pump {
                from,
                to,
                hold: round_trip / 2,
                ns_per_byte: 8e9 / bits_per_s,
                stop: stop.clone(),
                bytes,
            };
            pumps.push(std::thread::spawn(move || pump.run()));
        }
        Ok(Self {
            near,
            far,
            stop,
            pumps,
            to_near,
        })
    }

    /// Runs `f` on a thread in the near namespace; programs that it starts are there too.
    pub fn on_near<T: Send>(&self, f: impl FnOnce() -> T + Send) -> Result<T, BenchError> {
        self.near.run(f)
    }

    /// Runs `f` on a thread in the far namespace.
    pub fn on_far<T: Send>(&self, f: impl FnOnce() -> T + Send) -> Result<T, BenchError> {
        self.far.run(f)
    }

    /// Bytes that arrived at the near end so far, with IP and TCP headers.
    pub fn bytes_to_near(&self) -> u64 {
        self.to_near.load(Ordering::Relaxed)
    }

    /// What the link does: round-trip time of a connect in seconds, and bytes per second of one
    /// connection that moves 40 MB, slow start included.
    pub fn probe(&self) -> Result<(f64, f64), BenchError> {
        const BYTES: usize = 40_000_000;
        let listener = self
            .on_far(|| TcpListener::bind((FAR, 0)))?
            .map_err(io("listening"))?;
        let address = listener.local_addr().map_err(io("listening"))?;
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept()?;
            stream.write_all(&vec![0; BYTES])
        });
        let client = self.on_near(move || {
            let started = Instant::now();
            let mut stream = TcpStream::connect(address)?;
            let connected = started.elapsed();
            std::io::copy(&mut stream, &mut std::io::sink())?;
            Ok((
                connected.as_secs_f64(),
                BYTES as f64 / (started.elapsed() - connected).as_secs_f64(),
            ))
        })?;
        let result = client.map_err(io("probing the link"));
        let _ = server.join();
        result
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for pump in self.pumps.drain(..) {
            let _ = pump.join();
        }
    }
}

/// A network namespace; deleted when dropped.
struct Namespace {
    name: String,
}

impl Namespace {
    fn new(name: String) -> Result<Self, BenchError> {
        ip(&["netns", "add", &name])?;
        Ok(Self { name })
    }

    fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> Result<T, BenchError> {
        let path = format!("/var/run/netns/{}", self.name);
        let ns = File::open(&path).map_err(io(path))?;
        std::thread::scope(|scope| {
            let thread = scope.spawn(move || {
                // Only this thread moves; it ends with `f`.
                move_into_link_name_space(ns.as_fd(), Some(LinkNameSpaceType::Network))
                    .map_err(|e| io("entering a network namespace")(e.into()))?;
                Ok(f())
            });
            thread
                .join()
                .map_err(|_| BenchError::Setup("a thread in a namespace panicked".into()))?
        })
    }

    fn up(&self, device: &str, address: Ipv4Addr) -> Result<(), BenchError> {
        let net = format!("{address}/30");
        ip(&["-n", &self.name, "addr", "add", &net, "dev", device])?;
        ip(&[
            "-n",
            &self.name,
            "link",
            "set",
            device,
            "mtu",
            "1500",
            "txqueuelen",
            "10000",
            "up",
        ])?;
        ip(&["-n", &self.name, "link", "set", "lo", "up"])
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = ip(&["netns", "del", &self.name]);
    }
}

fn ip(args: &[&str]) -> Result<(), BenchError> {
    process::run(Command::new("ip").args(args)).map(drop)
}

/// A TUN device in the network namespace of the calling thread.
fn tun(name: &str) -> Result<File, BenchError> {
    const IFF_TUN: u16 = 0x0001;
    const IFF_NO_PI: u16 = 0x1000;
    const IFF_VNET_HDR: u16 = 0x4000;
    // Checksums, TSO4 and TSO6 are left to the device (TUN_F_*).
    const OFFLOADS: usize = 1 | 2 | 4;
    /// struct ifreq of linux/if.h: name, flags, and the rest of a union.
    #[repr(C)]
    struct IfReq {
        name: [u8; 16],
        flags: u16,
        rest: [u8; 22],
    }
    type SetInterface = rustix::ioctl::Setter<0x4004_54ca, IfReq>;
    type SetOffloads = rustix::ioctl::IntegerSetter<0x4004_54d0>;
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(rustix::fs::OFlags::NONBLOCK.bits() as i32)
        .open("/dev/net/tun")
        .map_err(io("/dev/net/tun"))?;
    let mut request = IfReq {
        name: [0; 16],
        flags: IFF_TUN | IFF_NO_PI | IFF_VNET_HDR,
        rest: [0; 22],
    };
    request.name[..name.len()].copy_from_slice(name.as_bytes());
    // SAFETY: TUNSETIFF reads a struct ifreq of 40 bytes, which IfReq is, and keeps no pointer.
    #[allow(unsafe_code)]
    let made = unsafe { rustix::ioctl::ioctl(&file, SetInterface::new(request)) };
    made.map_err(|e| io("making a TUN device")(e.into()))?;
    // SAFETY: TUNSETOFFLOAD takes its argument by value.
    #[allow(unsafe_code)]
    let set = unsafe { rustix::ioctl::ioctl(&file, SetOffloads::new_usize(OFFLOADS)) };
    set.map_err(|e| io("setting a TUN device's offloads")(e.into()))?;
    Ok(file)
}

/// One direction of a link.
struct Pump {
    from: File,
    to: File,
    hold: Duration,
    ns_per_byte: f64,
    stop: Arc<AtomicBool>,
    bytes: Arc<AtomicU64>,
}

impl Pump {
    fn run(mut self) {
        // Timers of this thread fire on time, not up to 50 µs late.
        let _ = rustix::thread::set_current_timer_slack(NonZeroU64::new(1));
        let mut held: VecDeque<(Instant, Vec<u8>)> = VecDeque::new();
        let mut free_at = Instant::now();
        let mut buf = vec![0; PACKET_MAX];
        while !self.stop.load(Ordering::Relaxed) {
            while held.front().is_some_and(|(due, _)| *due <= Instant::now()) {
                if let Some((_, packet)) = held.pop_front() {
                    // A full device drops, as a network card does.
                    let _ = self.to.write(&packet);
                }
            }
            self.wait(held.front().map(|(due, _)| *due));
            while let Ok(len) = self.from.read(&mut buf) {
                let now = Instant::now();
                free_at = free_at.max(now);
                if free_at - now > BUFFER {
                    continue;
                }
                let packet = len.saturating_sub(VNET_HEADER);
                let wire = packet + packet.div_ceil(SEGMENT).max(1) * SEGMENT_OVERHEAD;
                free_at += Duration::from_nanos((wire as f64 * self.ns_per_byte) as u64);
                self.bytes.fetch_add(packet as u64, Ordering::Relaxed);
                held.push_back((free_at + self.hold, buf[..len].to_vec()));
                if held.front().is_some_and(|(due, _)| *due <= now) {
                    break;
                }
            }
        }
    }

    /// Until a packet comes, or the first held one is due, or it may be time to stop.
    fn wait(&self, due: Option<Instant>) {
        let longest = Duration::from_millis(50);
        let left = due.map_or(longest, |due| due.saturating_duration_since(Instant::now()));
        let left = left.min(longest);
        let timeout = Timespec {
            tv_sec: 0,
            tv_nsec: i64::from(left.subsec_nanos()),
        };
        let _ = poll(
            &mut [PollFd::new(&self.from, PollFlags::IN)],
            Some(&timeout),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_has_the_delay_and_the_rate_that_were_asked_for() {
        assert!(
            rustix::process::geteuid().is_root(),
            "this test makes network namespaces: run it as root"
        );
        let link = Link::new(Duration::from_millis(20), 1e9).unwrap();
        let (round_trip, rate) = link.probe().unwrap();
        assert!((0.019..0.040).contains(&round_trip), "{round_trip}");
        assert!((10e6..126e6).contains(&rate), "{rate}");
    }
}
