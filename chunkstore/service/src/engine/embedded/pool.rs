//! Buffers that chunks are read into, used again and again: half a megabyte fresh from the kernel for
//! each read costs more than the read.

use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;

use super::record::MAX_RECORD;

/// Shorter records get memory of their own: nothing is gained by keeping it.
const LEAST_BYTES: usize = 256 << 10;
/// Capacities of buffers that are kept: a record of the usual chunk length, and the longest.
const CLASSES: [usize; 2] = [(512 << 10) + 4096, MAX_RECORD];
/// Idle buffers kept of each class: 50 MiB in all.
const KEPT: usize = 32;

/// The idle buffers. Cloning shares them.
#[derive(Clone, Default)]
pub struct Pool {
    idle: Arc<[Mutex<Vec<Vec<u8>>>; CLASSES.len()]>,
}

/// A buffer that goes back to its pool when the last [`Bytes`] over it are dropped.
struct Lent {
    /// As long as its class says, whatever is in it.
    buffer: Vec<u8>,
    /// How much of it counts.
    len: usize,
    class: usize,
    pool: Pool,
}

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        &self.buffer[..self.len]
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        let buffer = std::mem::take(&mut self.buffer);
        let mut idle = self.pool.idle[self.class].lock();
        if idle.len() < KEPT {
            idle.push(buffer);
        }
    }
}

impl Pool {
    /// `len` bytes, written by `fill`; what it fails with otherwise.
    pub fn read<E>(
        &self,
        len: usize,
        fill: impl FnOnce(&mut [u8]) -> Result<(), E>,
    ) -> Result<Bytes, E> {
        let class = CLASSES.iter().position(|capacity| len <= *capacity);
        let Some(class) = class.filter(|_| len >= LEAST_BYTES) else {
            let mut buffer = vec![0; len];
            fill(&mut buffer)?;
            return Ok(buffer.into());
        };
        let idle = self.idle[class].lock().pop();
        let mut lent = Lent {
            buffer: idle.unwrap_or_else(|| vec![0; CLASSES[class]]),
            len,
            class,
            pool: self.clone(),
        };
        fill(&mut lent.buffer[..len])?;
        Ok(Bytes::from_owner(lent))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_comes_back_when_the_last_reader_of_it_is_gone() {
        let pool = Pool::default();
        let fill = |buffer: &mut [u8]| {
            buffer.fill(7);
            Ok::<(), ()>(())
        };
        let bytes = pool.read(400 << 10, fill).unwrap();
        let part = bytes.slice(5..9);
        drop(bytes);
        assert_eq!(pool.idle[0].lock().len(), 0);
        assert_eq!(&part[..], [7; 4]);
        let at = part.as_ptr() as usize - 5;
        drop(part);
        assert_eq!(pool.idle[0].lock().len(), 1);
        let again = pool.read(300 << 10, fill).unwrap();
        assert_eq!((again.as_ptr() as usize, again.len()), (at, 300 << 10));
    }

    #[test]
    fn a_failed_read_gives_the_buffer_back_too() {
        let pool = Pool::default();
        assert_eq!(pool.read(MAX_RECORD, |_| Err("no")), Err("no"));
        assert_eq!(pool.idle[1].lock().len(), 1);
    }

    #[test]
    fn what_idles_is_bounded_and_small_records_are_not_kept() {
        let pool = Pool::default();
        let lent: Vec<_> = (0..KEPT * 2)
            .map(|_| pool.read(LEAST_BYTES, |_| Ok::<(), ()>(())).unwrap())
            .collect();
        drop(lent);
        assert_eq!(pool.idle[0].lock().len(), KEPT);
        drop(pool.read(10, |_| Ok::<(), ()>(())).unwrap());
        assert_eq!(pool.idle[0].lock().len(), KEPT);
    }
}
