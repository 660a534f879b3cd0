//! What a verification found, counted: damage, and what could not be checked, are two things.

use std::collections::HashSet;

use lazyimg_chunkstore::{CopyPlace, ReadError, Verified};

use crate::errno::{Failure, chain};
use crate::protocol::VerifyReport;

/// Counts the outcomes of a verification.
#[derive(Debug)]
pub struct Tally {
    report: VerifyReport,
    /// How many texts of each kind are kept.
    most: usize,
    /// Why chunks could not be checked, as far as it is in the report.
    causes: HashSet<String>,
}

impl Tally {
    /// An empty one that keeps at most `most` texts of each kind.
    pub fn new(most: usize) -> Self {
        Self {
            report: VerifyReport::default(),
            most,
            causes: HashSet::new(),
        }
    }

    /// Counts one chunk.
    pub fn add(&mut self, outcome: Result<Verified, ReadError>) {
        let report = &mut self.report;
        match outcome {
            Ok(verified) => {
                report.good += 1;
                report.healed += u64::from(verified.healed);
                report.cached += u64::from(verified.copy == CopyPlace::Cache);
            }
            Err(error) if error.is_damage() => {
                report.bad += 1;
                if report.failures.len() < self.most {
                    report.failures.push(chain(&error));
                }
            }
            Err(error) => {
                report.unreachable += 1;
                // An outage is one cause, not as many as there are chunks.
                let text = chain(&error);
                if report.unreachable_causes.len() < self.most
                    && self.causes.insert(Failure::from(error).cause())
                {
                    report.unreachable_causes.push(text);
                }
            }
        }
    }

    /// What was found.
    pub fn report(self) -> VerifyReport {
        self.report
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use lazyimg_chunkstore::{FetchError, TierFailure};
    use lazyimg_convergent::ChunkId;

    use super::*;

    fn failed(chunk: u8, error: FetchError) -> Result<Verified, ReadError> {
        Err(ReadError::Tiers {
            id: ChunkId([chunk; 32]),
            failures: vec![TierFailure {
                tier: "registry".to_owned(),
                error: Arc::new(error),
            }],
        })
    }

    #[test]
    fn an_outage_is_not_damage_and_is_told_once() {
        let mut tally = Tally::new(2);
        for chunk in 0..5 {
            tally.add(failed(chunk, FetchError::unavailable("refused")));
        }
        for chunk in 0..3 {
            tally.add(failed(chunk, FetchError::Corrupt("flipped".to_owned())));
        }
        tally.add(Ok(Verified {
            copy: CopyPlace::Cache,
            healed: false,
        }));
        let report = tally.report();
        assert_eq!(
            (report.unreachable, report.bad, report.good, report.cached),
            (5, 3, 1, 1)
        );
        assert_eq!(report.unreachable_causes.len(), 1, "{report:?}");
        assert_eq!(report.failures.len(), 2, "{report:?}");
    }
}
