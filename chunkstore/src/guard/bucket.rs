//! What hedges may cost: a token bucket that requests fill. Pure.

/// What a request puts in: one hedge for twenty requests, 5 %.
const TOKENS_PER_REQUEST: f64 = 0.05;
/// The most it holds: hedges that a burst of slow answers may take at once.
const MOST: f64 = 10.0;

/// Tokens that requests put in and hedges take. Empty at first: hedges are at most a twentieth of
/// the requests at any time.
#[derive(Debug, Default)]
pub struct HedgeBucket {
    tokens: f64,
}

impl HedgeBucket {
    /// Notes a request that is no hedge.
    pub fn request(&mut self) {
        self.tokens = (self.tokens + TOKENS_PER_REQUEST).min(MOST);
    }

    /// Whether there is a token to take.
    pub fn has(&self) -> bool {
        // A sum of twentieths falls a little short of the whole.
        self.tokens >= 1.0 - 1e-9
    }

    /// Takes a token; false when there is none: then do not hedge.
    pub fn take(&mut self) -> bool {
        let has = self.has();
        if has {
            self.tokens -= 1.0;
        }
        has
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn hedges_are_never_more_than_five_percent_of_the_requests(steps in prop::collection::vec(any::<bool>(), 0..3_000)) {
            let mut bucket = HedgeBucket::default();
            let (mut requests, mut hedges) = (0u32, 0u32);
            for is_request in steps {
                if is_request {
                    bucket.request();
                    requests += 1;
                } else if bucket.take() {
                    hedges += 1;
                }
                prop_assert!(hedges * 20 <= requests);
            }
        }
    }

    #[test]
    fn twenty_requests_earn_one_hedge_and_many_earn_ten() {
        let mut bucket = HedgeBucket::default();
        for _ in 0..20 {
            assert!(!bucket.has());
            bucket.request();
        }
        assert!(bucket.take() && !bucket.take());
        for _ in 0..10_000 {
            bucket.request();
        }
        assert_eq!((0..100).filter(|_| bucket.take()).count(), 10);
    }
}
