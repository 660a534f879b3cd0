//! Medians of several runs.

/// Several measurements of one thing.
#[derive(Debug, Clone, Default)]
pub struct Samples(Vec<f64>);

impl Samples {
    /// Adds a measurement.
    pub fn push(&mut self, value: f64) {
        self.0.push(value);
        self.0.sort_by(f64::total_cmp);
    }

    /// The middle one; the mean of the two middle ones when their number is even; NaN when empty.
    pub fn median(&self) -> f64 {
        let (n, v) = (self.0.len(), &self.0);
        match n {
            0 => f64::NAN,
            _ if n % 2 == 1 => v[n / 2],
            _ => (v[n / 2 - 1] + v[n / 2]) / 2.0,
        }
    }

    /// The least and the greatest.
    pub fn range(&self) -> (f64, f64) {
        let nan = f64::NAN;
        (
            *self.0.first().unwrap_or(&nan),
            *self.0.last().unwrap_or(&nan),
        )
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// The same measurements in another unit.
    pub fn map(&self, f: impl Fn(f64) -> f64) -> Self {
        let mut out = Self::default();
        self.0.iter().for_each(|v| out.push(f(*v)));
        out
    }
}

impl FromIterator<f64> for Samples {
    fn from_iter<I: IntoIterator<Item = f64>>(values: I) -> Self {
        let mut out = Self::default();
        values.into_iter().for_each(|v| out.push(v));
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle_whatever_the_order() {
        assert_eq!(Samples::from_iter([3.0, 1.0, 2.0]).median(), 2.0);
        assert_eq!(Samples::from_iter([4.0, 1.0, 2.0, 3.0]).median(), 2.5);
        assert_eq!(Samples::from_iter([4.0, 1.0]).range(), (1.0, 4.0));
        assert!(Samples::default().median().is_nan());
    }
}
